//! A recording of every [`Input`] of the engine: ring records byte for byte, all others as JSON. A replay gives the same inputs to a
//! new engine. Compressed, versioned, and readable up to the place where it breaks off.
//!
//! Layout: the magic line, then one gzip stream of frames: tag (1 byte), length (4 bytes, little endian), payload. The first frame is
//! the [`Header`].

mod replay;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::engine::{Input, Settings};
use crate::files;

pub use self::replay::{Line, ReplayError, replay, replay_frames};

/// The first bytes of a recording; the digit is the version.
const MAGIC: &[u8; 16] = b"jobwarden-rec 2\n";
/// How every version of the format begins.
const FAMILY: &[u8] = b"jobwarden-rec ";
/// A frame longer than this is none of ours: the largest is a snapshot of a host's processes.
const MAX_FRAME: u32 = 256 << 20;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A ring record, byte for byte.
    Event = 1,
    /// Any other input, as JSON with its time.
    Input = 2,
    /// The [`Header`], as JSON.
    Header = 3,
}

/// What the engine is made of. `config` is TOML, as `check --print` writes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Header {
    pub settings: Settings,
    pub config: String,
}

/// An input and its boot time (ns).
#[derive(Debug, Serialize, Deserialize)]
pub struct Timed<'a> {
    pub now: u64,
    #[serde(borrow)]
    pub input: Input<'a>,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is not a recording of this program: it does not begin with {expected:?}")]
    Foreign { path: PathBuf, expected: String },
    #[error(
        "{path} is a recording of format {found}, and this version reads format {ours}: replay it with `jobwarden replay` of the version that made it"
    )]
    Version { path: PathBuf, found: String, ours: String },
}

/// [`Timed`], borrowed.
#[derive(Serialize)]
struct TimedRef<'a, 'b> {
    now: u64,
    input: &'a Input<'b>,
}

/// Writes a recording.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    out: GzEncoder<BufWriter<File>>,
}

impl Recorder {
    /// Creates the file; one that exists is refused, so that no recording is lost by a restart.
    pub fn create(path: &Path) -> Result<Self, RecordingError> {
        let io = |source| RecordingError::Io { path: path.to_owned(), source };
        // It holds command lines as they are, before any masking. A new file is no other one: `create_new` (O_EXCL) follows no
        // symbolic link at the end of the path.
        let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
        let mut file = BufWriter::new(new);
        file.write_all(MAGIC).map_err(io)?;
        Ok(Self { path: path.to_owned(), out: GzEncoder::new(file, Compression::fast()) })
    }

    /// The first frame.
    pub fn header(&mut self, settings: &Settings, config: &Config) -> Result<(), RecordingError> {
        self.json(Frame::Header, &Header { settings: settings.clone(), config: config.to_toml() })
    }

    /// One input of the engine.
    pub fn input(&mut self, input: &Input<'_>, now: u64) -> Result<(), RecordingError> {
        match input {
            Input::Record { bytes, .. } => self.write(Frame::Event, bytes),
            other => self.json(Frame::Input, &TimedRef { now, input: other }),
        }
    }

    fn json(&mut self, frame: Frame, value: &impl Serialize) -> Result<(), RecordingError> {
        let bytes = serde_json::to_vec(value).map_err(|e| self.error(io::Error::other(e)))?;
        self.write(frame, &bytes)
    }

    fn error(&self, source: io::Error) -> RecordingError {
        RecordingError::Io { path: self.path.clone(), source }
    }

    pub fn write(&mut self, frame: Frame, payload: &[u8]) -> Result<(), RecordingError> {
        let path = &self.path;
        let io = |source| RecordingError::Io { path: path.clone(), source };
        let len = u32::try_from(payload.len()).map_err(|e| io(io::Error::other(e)))?;
        let mut head = [frame as u8, 0, 0, 0, 0];
        head[1..].copy_from_slice(&len.to_le_bytes());
        self.out.write_all(&head).map_err(io)?;
        self.out.write_all(payload).map_err(io)
    }

    /// Makes what was written so far readable, also if the agent is killed next.
    pub fn flush(&mut self) -> Result<(), RecordingError> {
        self.out.flush().map_err(|source| RecordingError::Io { path: self.path.clone(), source })
    }

    /// Ends the recording as a whole file.
    pub fn finish(self) -> Result<(), RecordingError> {
        let io = |source| RecordingError::Io { path: self.path.clone(), source };
        self.out.finish().map_err(io)?.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)
    }
}

/// Reads the frames of a recording, from any source of bytes.
pub struct Player<R: Read> {
    input: R,
    buf: Vec<u8>,
    /// Set when the stream broke off before its end.
    truncated: bool,
}

impl Player<GzDecoder<BufReader<File>>> {
    pub fn open(path: &Path) -> Result<Self, RecordingError> {
        let io = |source| RecordingError::Io { path: path.to_owned(), source };
        let mut file = BufReader::new(files::open_regular(path).map_err(|e| io(e.into()))?);
        let begin = file.fill_buf().map_err(io)?;
        let begin = begin[..begin.len().min(MAGIC.len())].to_vec();
        let version = |b: &[u8]| String::from_utf8_lossy(&b[FAMILY.len()..]).trim_end().to_owned();
        match Self::new(file).map_err(io)? {
            Some(player) => Ok(player),
            None if begin.starts_with(FAMILY) => Err(RecordingError::Version {
                path: path.to_owned(),
                found: version(&begin),
                ours: version(MAGIC),
            }),
            None => Err(RecordingError::Foreign {
                path: path.to_owned(),
                expected: String::from_utf8_lossy(MAGIC).trim_end().to_owned(),
            }),
        }
    }
}

impl<R: Read> Player<GzDecoder<R>> {
    /// None if the bytes are no recording.
    pub fn new(mut input: R) -> io::Result<Option<Self>> {
        let mut magic = [0; MAGIC.len()];
        match input.read_exact(&mut magic) {
            Ok(()) if &magic == MAGIC => Ok(Some(Self::frames(GzDecoder::new(input)))),
            Ok(()) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl<R: Read> Player<R> {
    /// Reads frames that are not compressed and have no magic line before them.
    pub fn frames(input: R) -> Self {
        Self { input, buf: Vec::new(), truncated: false }
    }

    /// The next frame; None at the end, or where the file breaks off or makes no sense (see [`Self::truncated`]).
    pub fn next_frame(&mut self) -> Option<(Frame, &[u8])> {
        let mut head = [0; 5];
        let mut got = 0;
        while got < head.len() {
            match self.input.read(&mut head[got..]) {
                Ok(0) if got == 0 => return None,
                Ok(n) if n > 0 => got += n,
                _ => return self.broken(),
            }
        }
        let [tag, len @ ..] = head;
        let len = u32::from_le_bytes(len);
        let frame = match tag {
            1 => Frame::Event,
            2 => Frame::Input,
            3 => Frame::Header,
            _ => return self.broken(),
        };
        if len > MAX_FRAME {
            return self.broken();
        }
        self.buf.clear();
        // `take` bounds what a wrong length can make us allocate to what is really there.
        match self.input.by_ref().take(len.into()).read_to_end(&mut self.buf) {
            Ok(n) if n == len as usize => Some((frame, &self.buf)),
            _ => self.broken(),
        }
    }

    fn broken(&mut self) -> Option<(Frame, &[u8])> {
        self.truncated = true;
        None
    }

    /// Whether the recording broke off before its end.
    #[must_use]
    pub const fn truncated(&self) -> bool {
        self.truncated
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(frames: &[(Frame, Vec<u8>)]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        let mut r = Recorder::create(&path).unwrap();
        for (f, b) in frames {
            r.write(*f, b).unwrap();
        }
        r.finish().unwrap();
        assert!(Recorder::create(&path).is_err(), "a recording is never overwritten");
        std::fs::read(path).unwrap()
    }

    #[test]
    fn any_cut_gives_a_prefix_and_says_so() {
        let frames: Vec<_> = (0..200u32)
            .map(|i| (if i % 3 == 0 { Frame::Input } else { Frame::Event }, i.to_le_bytes().repeat(7)))
            .collect();
        let whole = recorded(&frames);
        for cut in 0..=whole.len() {
            let Some(mut p) = Player::new(&whole[..cut]).unwrap() else {
                assert!(cut < MAGIC.len());
                continue;
            };
            let mut n = 0;
            while let Some((f, b)) = p.next_frame() {
                assert_eq!((f, b), (frames[n].0, &frames[n].1[..]));
                n += 1;
            }
            assert!(n == frames.len() || p.truncated(), "cut at {cut}: {n} frames");
        }
    }

    #[test]
    fn another_version_is_rejected_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        std::fs::write(&path, b"jobwarden-rec 1\n\x1f\x8b").unwrap();
        let error = Player::open(&path).err().unwrap().to_string();
        assert!(error.contains("format 1") && error.contains("format 2"), "{error}");
        std::fs::write(&path, b"#!/bin/sh\n").unwrap();
        assert!(matches!(Player::open(&path), Err(RecordingError::Foreign { .. })));
    }
}
