//! Ctrl-C: nothing more is started, so that all that was changed is put back on the way out.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};

static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int) {
    STOPPED.store(true, Ordering::Relaxed);
}

/// From Ctrl-C on nothing more is started, so that all that was changed is put back on the way out.
pub(crate) fn heed_signals() {
    let handler = stop as extern "C" fn(libc::c_int);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Before anything is started.
pub(crate) fn going_on() -> Result<()> {
    ensure!(!STOPPED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}
