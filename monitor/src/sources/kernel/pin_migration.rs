//! What another probe object's pins hold is copied, then they are removed: lineage, the dead, jobs.
//!
//! Both sets are attached while it is copied. A process that is forked meanwhile by one whose entry is not copied yet
//! is in no job here but is in the old set, which goes on: passes are repeated until one changes nothing.

use std::io;
use std::path::Path;

use monitor_abi::{ABI_VERSION, LINEAGE_SPARES_CHILDREN, Lineage, SPARES_BITS, is_spared};

use super::error::KernelError;
use super::lineage::{Edit, Edited};
use super::maps::Maps;
use super::marks::spared;
use super::{JOBS_MAX, Kernel, pin, stats};

const PASSES: usize = 16;

impl Kernel {
    /// Takes over from every other set below the agent's folder. One that cannot be read is removed all the same: a
    /// snapshot mends the rest.
    pub(super) fn take_over_all(&self) -> Result<(), KernelError> {
        let others = self.pins.as_ref().map(pin::Pins::others).transpose()?.unwrap_or_default();
        for old in others {
            if let Err(e) = self.take_over(&old) {
                tracing::warn!(pins = %old.display(), error = %e, "pins of another version are dropped, their lineage is lost");
            }
            pin::drop_set(&old)?;
        }
        Ok(())
    }

    fn take_over(&self, old: &Path) -> Result<(), KernelError> {
        let same_layout = old.file_name().and_then(|n| n.to_str()).is_some_and(|n| {
            n.strip_prefix(&format!("v{ABI_VERSION}")).is_some_and(|rest| rest.starts_with('-'))
        });
        if !same_layout {
            return Err(KernelError::Pin {
                path: old.to_owned(),
                what: "its records have another layout".into(),
            });
        }
        let from = Maps::new(&pin::open_set(old)?.maps)?;
        let what = || KernelError::io(format!("copy the maps in {}", old.display()));
        self.copy_jobs(&from).map_err(what())?;
        let before = from.control.get(&0).map_err(what())?.unwrap_or_default().spares;
        let now = self.spares().map_err(what())?;
        // The old set's dooms are in force here until leftovers are taken away, and so is who it spares.
        let here = |l: Lineage| {
            let heirs = l.flags & LINEAGE_SPARES_CHILDREN != 0;
            let marks = if is_spared(l.flags, before) { spared(now, heirs) } else { 0 };
            Lineage { flags: (l.flags & !SPARES_BITS) | marks, ..l }
        };
        let most = stats::max_entries(&from.lineage.fd).map_err(what())? as usize * 2;
        for _ in 0..PASSES {
            if !self.copy_lineage(&from, most, &here).map_err(what())? {
                break;
            }
        }
        let most = stats::max_entries(&from.dead.fd).map_err(what())? as usize * 2;
        for key in from.dead.keys(most).map_err(what())? {
            if let Some(l) = from.dead.get(&key).map_err(what())? {
                self.maps.dead.put_new(&key, &here(l)).map_err(what())?;
            }
        }
        // The old set's doom ends with it.
        self.attach_while_doomed().map_err(what())
    }

    fn copy_jobs(&self, from: &Maps) -> io::Result<()> {
        for id in from.jobs.keys(JOBS_MAX * 2)? {
            if let Some(j) = from.jobs.get(&id)? {
                self.maps.jobs.put_new(&id, &j)?;
            }
        }
        Ok(())
    }

    /// One pass; whether it changed anything. `here`: an entry as it is in this set.
    fn copy_lineage(&self, from: &Maps, most: usize, here: &impl Fn(Lineage) -> Lineage) -> io::Result<bool> {
        let mut changed = false;
        for key in from.lineage.keys(most)? {
            let Some(l) = from.lineage.get(&key)?.map(here) else { continue };
            let new = self.maps.lineage.put_new(&key, &l)?;
            // One that is here was forked since this set was attached: the parent is right, the job may not be. One that is new
            // is marked as a member so.
            let e = Edit { job: Some(l.job), set: l.flags & SPARES_BITS, ..Edit::of(key.into()) };
            changed |= self.edit(&e)? == Edited::Changed || new;
        }
        Ok(changed)
    }
}
