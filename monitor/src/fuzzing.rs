//! One entry for each parser of bytes from outside. The fuzz targets and the ordinary tests, which run the same corpus,
//! both call these; nothing else does.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::{self, Overrides};
use crate::model::container::Cgroups;
use crate::model::event;
use crate::recording::{self, Player};
use crate::sources::proc;

/// A record of the ring.
pub fn record(bytes: &[u8]) {
    let _ = event::decode(bytes);
}

/// A recording, and the records in it.
pub fn recording(bytes: &[u8]) {
    let Ok(Some(mut player)) = Player::new(bytes) else { return };
    // A small file can hold many frames: compression of nothing is cheap.
    for _ in 0..10_000 {
        match player.next_frame() {
            Some((_, payload)) => record(payload),
            None => return,
        }
    }
}

/// The frames of a recording, not compressed, through the whole engine; what it makes of them is written as JSON.
pub fn replay(bytes: &[u8]) {
    let mut player = Player::frames(bytes);
    let _ = recording::replay_frames(&mut player, None, &mut |line| {
        serde_json::to_writer(std::io::sink(), &line)?;
        Ok(())
    });
}

/// A config file; what `check --print` writes for a valid one must be a config again, and the same one.
///
/// # Panics
/// If it is not.
pub fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(c) = config::parse(Path::new("fuzz.toml"), text, &BTreeMap::new(), &Overrides::default())
    {
        let printed = c.to_toml();
        let again = config::parse(Path::new("again.toml"), &printed, &BTreeMap::new(), &Overrides::default());
        match again {
            Ok(a) => assert_eq!(a.to_toml(), printed),
            Err(e) => panic!("{e}\n{printed}"),
        }
    }
}

/// Files of /proc.
pub fn proc(bytes: &[u8]) {
    let _ = proc::parse_stat(bytes);
    let _ = proc::parse_status(bytes);
    let _ = crate::model::argv::split_argv(bytes).count();
    let _ = proc::fd::parse_fdinfo(bytes);
    let _ = Cgroups::parse(bytes).container();
}
