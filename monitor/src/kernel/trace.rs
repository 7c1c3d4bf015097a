//! `--trace-probes`: attaches the programs that write lines by aya-log, and hands the lines to `tracing`.

use std::io;
use std::os::fd::AsFd as _;

use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::offsets::PROBES;
use super::{Kernel, sys};

/// aya-log's lines, at `info` under the target `probes`.
struct Lines;

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        tracing::info!(target: "probes", "{}", record.args());
    }
    fn flush(&self) {}
}

impl Kernel {
    /// Hands on the probes' lines until it is dropped; then the programs are detached. Wants [`super::Options::trace`].
    pub async fn trace(&self) -> io::Result<()> {
        let tracers = || PROBES.iter().filter(|p| p.is_tracer());
        let mut links = Vec::new();
        let mut logger = None;
        for p in tracers() {
            let program = self.program(p.name)?;
            if logger.is_none() {
                let id = sys::prog_info(program.as_fd())?.id;
                logger = Some(EbpfLogger::init_from_id_with_logger(id, Lines).map_err(io::Error::other)?);
            }
            links.push(sys::attach_tp_btf(program)?);
        }
        let Some(logger) = logger else { return Ok(()) };
        // SAFETY: the logger owns its descriptor and always gives the same one.
        let fd = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        let mut fd = fd.map_err(io::Error::from)?;
        loop {
            let mut ready = fd.readable_mut().await?;
            // Cleared first: what is written from now on sets it again.
            ready.clear_ready();
            ready.get_inner_mut().flush();
        }
    }
}
