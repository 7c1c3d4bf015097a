//! Recordings changed at random, from a seed: frames lost, doubled and out of order; numbers and IDs at their limits or taken
//! from elsewhere in the recording; bytes flipped. Most results still parse, so that they reach the engine.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result, ensure};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::Value;

const MAGIC: &[u8] = b"jobwarden-rec 2\n";
const EVENT: u8 = 1;
/// Longer ones are not taken apart: a snapshot of the whole host would take most of the time.
const LONG: usize = 32 << 10;
/// Most copies of one element or frame.
const COPIES: u64 = 2_000;
const LIMITS: [u64; 12] = [
    0,
    1,
    2,
    u16::MAX as u64,
    u32::MAX as u64 - 1,
    u32::MAX as u64,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1_000_000_000,
    u64::MAX - 1,
    u64::MAX,
];

/// A frame: its tag and its payload.
pub type Frame = (u8, Vec<u8>);

/// Random numbers from a seed (splitmix64).
pub struct Chance(pub u64);

impl Chance {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % (n.max(1) as u64)) as usize
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// The frames of a recording file.
pub fn read(file: &[u8]) -> Result<Vec<Frame>> {
    let rest = file.strip_prefix(MAGIC).context("no recording")?;
    let mut bytes = Vec::new();
    GzDecoder::new(rest).read_to_end(&mut bytes)?;
    let (mut frames, mut rest) = (Vec::new(), &bytes[..]);
    while let Some((head, body)) = rest.split_at_checked(5) {
        let len = u32::from_le_bytes(head[1..].try_into()?) as usize;
        let (payload, after) = body.split_at_checked(len).context("a frame is cut")?;
        frames.push((head[0], payload.to_vec()));
        rest = after;
    }
    ensure!(rest.is_empty(), "bytes after the last frame");
    Ok(frames)
}

/// A recording file of these frames.
pub fn write(frames: &[Frame]) -> Result<Vec<u8>> {
    // The magic line stands before the stream.
    let mut out = GzEncoder::new(MAGIC.to_vec(), Compression::fast());
    for (tag, payload) in frames {
        out.write_all(&[*tag])?;
        out.write_all(&u32::try_from(payload.len())?.to_le_bytes())?;
        out.write_all(payload)?;
    }
    Ok(out.finish()?)
}

/// All IDs and large numbers of a recording, from which a mutation takes another.
pub struct Pool {
    keys: Vec<String>,
    numbers: Vec<u64>,
}

impl Pool {
    #[must_use]
    pub fn new(frames: &[Frame]) -> Self {
        let (mut keys, mut numbers) =
            (vec!["0:0".to_owned(), format!("{}:{}", u32::MAX, u64::MAX)], Vec::new());
        for (tag, payload) in frames {
            if *tag == EVENT {
                numbers.extend(
                    payload.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default())),
                );
            } else if payload.len() < LONG
                && let Ok(v) = serde_json::from_slice(payload)
            {
                each(&v, &mut |leaf| match leaf {
                    Value::String(s) if is_key(s) => keys.push(s.clone()),
                    Value::Number(n) => numbers.extend(n.as_u64()),
                    _ => {}
                });
            }
        }
        keys.sort_unstable();
        keys.dedup();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.push(0);
        Self { keys, numbers }
    }

    fn number(&self, c: &mut Chance, was: u64) -> u64 {
        match c.below(4) {
            0 => was.wrapping_add(*c.pick(&[1, u64::MAX, 1_000_000_000, 3_600_000_000_000])),
            1 => *c.pick(&self.numbers),
            _ => *c.pick(&LIMITS),
        }
    }
}

fn is_key(s: &str) -> bool {
    s.split_once(':').is_some_and(|(pid, start)| pid.parse::<u32>().is_ok() && start.parse::<u64>().is_ok())
}

fn each<'a>(v: &'a Value, f: &mut impl FnMut(&'a Value)) {
    match v {
        Value::Array(a) => a.iter().for_each(|v| each(v, f)),
        Value::Object(o) => o.values().for_each(|v| each(v, f)),
        leaf => f(leaf),
    }
}

/// Changes the `n`th value that is no object, counted in the order of the text; `n` counts down.
fn nth(v: &mut Value, n: &mut usize, c: &mut Chance, pool: &Pool) {
    match v {
        Value::Object(o) => return o.values_mut().for_each(|v| nth(v, n, c, pool)),
        // Bytes as numbers are not taken one by one.
        Value::Array(a) if !a.first().is_some_and(Value::is_number) => {
            for v in a {
                nth(v, n, c, pool);
            }
        }
        _ => {}
    }
    if *n == 0 {
        change(v, c, pool);
    }
    *n = n.wrapping_sub(1);
}

fn change(v: &mut Value, c: &mut Chance, pool: &Pool) {
    match v {
        Value::Bool(b) => *b = !*b,
        Value::Number(n) => *v = pool.number(c, n.as_u64().unwrap_or_default()).into(),
        Value::String(s) if is_key(s) => s.clone_from(c.pick(&pool.keys)),
        Value::String(s) => {
            if let Some((at, _)) = s.char_indices().nth(c.below(s.chars().count())) {
                s.insert(at, *c.pick(&['0', '9', '(', '\0', 'z', '\u{202e}']));
            }
        }
        Value::Array(a) if !a.is_empty() => match c.below(3) {
            0 => a.clear(),
            1 => {
                a.remove(c.below(a.len()));
            }
            _ => {
                let one = c.pick(a).clone();
                a.extend(std::iter::repeat_n(one, (c.number() % COPIES) as usize));
            }
        },
        other => *other = Value::Null,
    }
}

fn in_event(payload: &mut Vec<u8>, c: &mut Chance, pool: &Pool) {
    let at = c.below(payload.len() / 4) * 4;
    match c.below(8) {
        0 => payload.truncate(c.below(payload.len())),
        1 | 2 => {
            if let Some(b) = payload.get_mut(at) {
                *b ^= 1 << c.below(8);
            }
        }
        3 => {
            if let Some(field) = payload.get_mut(at..at + 4) {
                field.copy_from_slice(&(pool.number(c, 0) as u32).to_le_bytes());
            }
        }
        _ => {
            let at = at / 8 * 8;
            if let Some(field) = payload.get_mut(at..at + 8) {
                let was = u64::from_le_bytes((&*field).try_into().unwrap_or_default());
                field.copy_from_slice(&pool.number(c, was).to_le_bytes());
            }
        }
    }
}

fn in_input(payload: &mut Vec<u8>, c: &mut Chance, pool: &Pool) {
    if payload.len() > LONG || c.below(16) == 0 {
        let at = c.below(payload.len());
        payload[at] ^= 1 << c.below(7);
        return;
    }
    let Ok(mut v) = serde_json::from_slice::<Value>(payload) else { return };
    let mut leaves = 0;
    each(&v, &mut |_| leaves += 1);
    let mut n = c.below(leaves.min(200));
    nth(&mut v, &mut n, c, pool);
    if let Ok(text) = serde_json::to_vec(&v) {
        *payload = text;
    }
}

fn in_order(frames: &mut Vec<Frame>, i: usize, c: &mut Chance) {
    let other = 1 + c.below(frames.len() - 1);
    match c.below(5) {
        0 => {
            frames.remove(i);
        }
        1 => frames.swap(i, other),
        2 => {
            let moved = frames.remove(i);
            frames.insert(other.min(frames.len()), moved);
        }
        3 => {
            let again = frames[i].clone();
            frames.insert(other, again);
        }
        _ => {
            // A long frame many times is only slow.
            let most = COPIES.min(1 + 100_000 / frames[i].1.len().max(1) as u64);
            let one = frames[i].clone();
            frames.splice(i..i, std::iter::repeat_n(one, (c.number() % most) as usize));
        }
    }
}

/// Up to eight changes; the first frame, of which the engine is made, is seldom one of them.
pub fn mutate(frames: &mut Vec<Frame>, c: &mut Chance, pool: &Pool) {
    for _ in 0..=c.below(8) {
        if frames.len() < 3 {
            return;
        }
        let i = if c.below(20) == 0 { 0 } else { 1 + c.below(frames.len() - 1) };
        match c.below(3) {
            0 if i > 0 => in_order(frames, i, c),
            _ if frames[i].0 == EVENT => in_event(&mut frames[i].1, c, pool),
            _ => in_input(&mut frames[i].1, c, pool),
        }
    }
}
