//! The probes' maps as the agent reads them: typed, each call one bpf(2) or a bounded loop of them.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::MapData;
use monitor_abi::{Control, Counter, Job, KINDS, KillCounter, Lineage, ProcKey};

use super::error::KernelError;
use super::sys::{self, Plain};

/// A hash or array map.
pub(super) struct Table<K, V> {
    pub(super) fd: OwnedFd,
    types: PhantomData<(K, V)>,
}

impl<K: Plain, V: Plain> Table<K, V> {
    /// Compares the sizes first: a map from a pin may be anybody's, and the kernel writes as much as its value has.
    fn new(name: &str, fd: OwnedFd) -> Result<Self, KernelError> {
        let info = sys::dup(fd.as_fd()).map_err(aya::maps::MapError::IoError).and_then(MapData::from_fd);
        let info =
            info.and_then(|m| m.info()).map_err(|e| KernelError::Object(format!("map {name}: {e}")))?;
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        if (key, value) == (size_of::<K>(), size_of::<V>()) {
            return Ok(Self { fd, types: PhantomData });
        }
        Err(KernelError::Object(format!(
            "the map {name} has keys of {key} and values of {value} bytes, not {} and {}; `jobwarden unpin` removes old pins",
            size_of::<K>(),
            size_of::<V>()
        )))
    }

    pub(super) fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = vec![0; size_of::<V>()];
        Ok(sys::map_lookup(self.fd.as_fd(), key, &mut value)?.then(|| sys::rows_of(&value)[0]))
    }

    pub(super) fn put(&self, key: &K, value: &V) -> io::Result<()> {
        sys::map_update(self.fd.as_fd(), key, value, false)
    }

    /// False if there is an entry already; it stays.
    pub(super) fn put_new(&self, key: &K, value: &V) -> io::Result<bool> {
        match sys::map_update(self.fd.as_fd(), key, value, true) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        }
    }

    pub(super) fn delete(&self, key: &K) -> io::Result<bool> {
        sys::map_delete(self.fd.as_fd(), key)
    }

    /// The keys of a hash map, read some thousand at a time while the probes go on; the walk ends after `max` of them or a little
    /// more. One that is deleted and made anew meanwhile may come twice.
    pub(super) fn keys(&self, max: usize) -> io::Result<Vec<K>> {
        let (mut keys, mut bucket) = (Vec::new(), None);
        while keys.len() < max {
            bucket = sys::map_keys::<K, V>(self.fd.as_fd(), bucket, &mut keys)?;
            if bucket.is_none() {
                break;
            }
        }
        Ok(keys)
    }
}

impl<V: Plain> Table<u32, V> {
    /// The entry at `index` of a per-CPU array, by CPU number.
    fn per_cpu(&self, index: u32, cpus: usize) -> io::Result<Vec<V>> {
        let size = size_of::<V>().next_multiple_of(8);
        let mut values = vec![0; size * cpus];
        sys::map_lookup(self.fd.as_fd(), &index, &mut values)?;
        Ok(values.chunks_exact(size).map(|c| sys::rows_of(&c[..size_of::<V>()])[0]).collect())
    }
}

/// All maps but the ring.
pub(super) struct Maps {
    counters: Table<u32, Counter>,
    kills: Table<u32, KillCounter>,
    pub(super) lineage: Table<ProcKey, Lineage>,
    pub(super) dead: Table<ProcKey, Lineage>,
    pub(super) jobs: Table<u64, Job>,
    pub(super) control: Table<u32, Control>,
    pub(super) inodes: Table<u64, u32>,
    cpus: usize,
}

impl Maps {
    /// Opens each once more.
    pub(super) fn new(fds: &[(&'static str, OwnedFd)]) -> Result<Self, KernelError> {
        let take = |name: &str| {
            let fd = fds.iter().find(|(n, _)| *n == name).map(|(_, fd)| sys::dup(fd.as_fd()));
            fd.ok_or_else(|| {
                KernelError::Object(format!("it has no map {name}; rebuild it: cargo xtask ebpf"))
            })?
            .map_err(KernelError::io(format!("keep the map {name}")))
        };
        let cpus = aya::util::nr_cpus().map_err(|(file, source)| KernelError::Io {
            what: format!("read the number of possible CPUs from {file}"),
            source,
        })?;
        Ok(Self {
            counters: Table::new("COUNTERS", take("COUNTERS")?)?,
            kills: Table::new("KILLS", take("KILLS")?)?,
            lineage: Table::new("LINEAGE", take("LINEAGE")?)?,
            dead: Table::new("DEAD", take("DEAD")?)?,
            jobs: Table::new("JOBS", take("JOBS")?)?,
            control: Table::new("CONTROL", take("CONTROL")?)?,
            inodes: Table::new("INODES", take("INODES")?)?,
            cpus,
        })
    }

    /// By CPU, then by kind.
    pub(super) fn counters(&self) -> io::Result<Vec<[Counter; KINDS]>> {
        let mut all = vec![[Counter::default(); KINDS]; self.cpus];
        for kind in 0..KINDS {
            let of_kind = self.counters.per_cpu(kind as u32, self.cpus)?;
            all.iter_mut().zip(of_kind).for_each(|(cpu, c)| cpu[kind] = c);
        }
        Ok(all)
    }

    pub(super) fn kills(&self) -> io::Result<KillCounter> {
        Ok(self.kills.per_cpu(0, self.cpus)?.into_iter().fold(KillCounter::default(), |a, k| KillCounter {
            ok: a.ok + k.ok,
            busy: a.busy + k.busy,
            perm: a.perm + k.perm,
            other: a.other + k.other,
        }))
    }
}
