//! `--trace-probes`: attaches the programs that write lines by aya-log, and hands the lines to `tracing`.

use std::io;
use std::os::fd::OwnedFd;

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

/// The programs that write lines, attached; they are detached when it goes.
pub struct Tracer {
    logger: EbpfLogger<Lines>,
    _links: Vec<OwnedFd>,
}

impl Kernel {
    /// Wants [`super::Options::trace`], and the right to open programs by their ids (CAP_SYS_ADMIN): before privileges are
    /// given up.
    pub fn tracer(&self) -> io::Result<Tracer> {
        let tracers: Vec<_> = PROBES.iter().filter(|p| p.is_tracer()).map(|p| p.name).collect();
        // Any of them leads to the map that all write to.
        let first = self.program(tracers.first().copied().unwrap_or_default())?;
        let id = sys::prog_info(first)?.id;
        let logger = EbpfLogger::init_from_id_with_logger(id, Lines).map_err(io::Error::other)?;
        let links =
            tracers.iter().map(|name| sys::attach_tp_btf(self.program(name)?)).collect::<io::Result<_>>()?;
        Ok(Tracer { logger, _links: links })
    }
}

impl Tracer {
    /// Hands on the probes' lines until it is dropped. Within a tokio runtime.
    pub async fn run(self) -> io::Result<()> {
        let Self { logger, _links } = self;
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
