//! Everything that a running agent asks of bpf(), done once: what fails now would fail in the middle of a kill.

use std::io;

use super::offsets::{SYS_ENTER, TASKS};
use super::{Edit, Kernel, sys};
use crate::model::key::Key;

impl Kernel {
    /// Reads and writes a map, runs a program and an iterator, and attaches the probe of dooms for a moment. Changes nothing:
    /// the probe looks only at who is doomed.
    pub fn self_test(&self) -> io::Result<()> {
        {
            let _guard = super::lock(&self.editing);
            self.control(|_| ())?;
        }
        self.maps.jobs.keys(super::JOBS_MAX * 2)?;
        self.probes()?;
        // Of no process: missing.
        self.edit(&Edit::of(Key::default()))?;
        sys::read_iter(self.iterator(TASKS)?, false)?;
        match self.program(SYS_ENTER) {
            Ok(program) => sys::attach_tp_btf(program).map(drop),
            // Off on this kernel: it is never attached.
            Err(_) => Ok(()),
        }
    }
}
