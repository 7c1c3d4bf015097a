//! A walker of BTF (`Documentation/bpf/btf.rst`): from `struct.field.field` to a byte offset, and whether a type is
//! there. Any bytes give an answer or a typed error; nothing panics and nothing recurses without a bound.

/// What is wrong with the BTF, or missing from it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BtfError {
    #[error("no BTF: it does not begin with the magic number 0xeb9f")]
    Magic,
    #[error("BTF ends in the middle of {0}")]
    Truncated(&'static str),
    #[error("BTF has a type of kind {0}, which this program does not know")]
    Kind(u32),
    #[error("this kernel has no {0}")]
    NoType(String),
    #[error("this kernel has no {0}")]
    NoField(String),
    #[error("{0} is a bit field")]
    BitField(String),
}

/// `include/uapi/linux/btf.h`.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// Anonymous structs and chains of typedefs are followed so deep and no deeper.
const DEPTH: u32 = 32;
/// What a type of the kernel's takes at least on average, members included.
const TYPE_BYTES: usize = 24;

#[derive(Clone, Copy)]
struct Type {
    name: u32,
    info: u32,
    /// A size or the id of a type, by kind.
    size_or_id: u32,
    /// Where what follows the type's head begins.
    body: u32,
}

impl Type {
    const fn kind(self) -> u32 {
        (self.info >> 24) & 0x1f
    }
    const fn vlen(self) -> usize {
        (self.info & 0xffff) as usize
    }
    const fn kind_flag(self) -> bool {
        self.info >> 31 == 1
    }
}

/// A parsed BTF.
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// By id. Names are looked for in it one by one: an index by name takes longer to make than the few that are asked for.
    index: Vec<Type>,
}

fn u32_at(b: &[u8], at: usize, what: &'static str) -> Result<u32, BtfError> {
    let end = at.checked_add(4).ok_or(BtfError::Truncated(what))?;
    let four = b.get(at..end).ok_or(BtfError::Truncated(what))?;
    Ok(u32::from_ne_bytes(four.try_into().map_err(|_| BtfError::Truncated(what))?))
}

fn section<'a>(
    b: &'a [u8],
    header: u32,
    at: u32,
    len: u32,
    what: &'static str,
) -> Result<&'a [u8], BtfError> {
    let begin = (header as usize).checked_add(at as usize).ok_or(BtfError::Truncated(what))?;
    let end = begin.checked_add(len as usize).ok_or(BtfError::Truncated(what))?;
    b.get(begin..end).ok_or(BtfError::Truncated(what))
}

impl<'a> Btf<'a> {
    /// Parses `/sys/kernel/btf/vmlinux` or bytes like it, in this machine's byte order.
    pub fn parse(b: &'a [u8]) -> Result<Self, BtfError> {
        if b.get(..2) != Some(&0xeb9f_u16.to_ne_bytes()[..]) {
            return Err(BtfError::Magic);
        }
        let field = |at| u32_at(b, at, "its header");
        let header = field(4)?;
        let types = section(b, header, field(8)?, field(12)?, "its types")?;
        let strings = section(b, header, field(16)?, field(20)?, "its strings")?;
        let void = Type { name: 0, info: 0, size_or_id: 0, body: 0 };
        let mut index = Vec::with_capacity(1 + types.len() / TYPE_BYTES);
        index.push(void);
        let mut at = 0;
        while at < types.len() {
            let word = |i: usize| u32_at(types, at + i * 4, "a type");
            let t = Type { name: word(0)?, info: word(1)?, size_or_id: word(2)?, body: at as u32 + 12 };
            let extra = match t.kind() {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => t.vlen() * 12,
                kind::ENUM | kind::FUNC_PROTO => t.vlen() * 8,
                // Pointer, forward, qualifiers, typedef, function, float, type tag.
                2 | 7..=12 | 16 | kind::TYPE_TAG => 0,
                k => return Err(BtfError::Kind(k)),
            };
            index.push(t);
            at += 12 + extra;
        }
        Ok(Self { types, strings, index })
    }

    /// The first type of one of these kinds with this name.
    fn find(&self, kinds: &[u32], name: &[u8]) -> Option<u32> {
        let same = |t: &Type| {
            let rest = self.strings.get(t.name as usize..).unwrap_or_default();
            rest.strip_prefix(name).is_some_and(|rest| rest.first().is_none_or(|&c| c == 0))
        };
        let at = self.index.iter().position(|t| kinds.contains(&t.kind()) && t.name != 0 && same(t))?;
        Some(at as u32)
    }

    fn get(&self, id: u32) -> Option<Type> {
        self.index.get(id as usize).copied()
    }

    /// Through typedefs and qualifiers.
    fn strip(&self, mut id: u32) -> Option<(u32, Type)> {
        for _ in 0..DEPTH {
            let t = self.get(id)?;
            match t.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = t.size_or_id;
                }
                _ => return Some((id, t)),
            }
        }
        None
    }

    /// `(offset in bits, type, whether it is a bit field)` of a member, looked for in anonymous members too.
    fn member(&self, id: u32, want: &[u8], depth: u32) -> Option<(u32, u32, bool)> {
        let t = self.get(id)?;
        if depth == 0 || !matches!(t.kind(), kind::STRUCT | kind::UNION) {
            return None;
        }
        for i in 0..t.vlen() {
            let word = |w: usize| u32_at(self.types, t.body as usize + i * 12 + w * 4, "a member").ok();
            let (name, ty, at) = (word(0)?, word(1)?, word(2)?);
            let (bits, width) = if t.kind_flag() { (at & 0x00ff_ffff, at >> 24) } else { (at, 0) };
            if name != 0 {
                if string(self.strings, name) == want {
                    return Some((bits, ty, width != 0));
                }
            } else if let Some((inner, _)) = self.strip(ty)
                && let Some((more, ty, field)) = self.member(inner, want, depth - 1)
            {
                return Some((bits.checked_add(more)?, ty, field));
            }
        }
        None
    }

    /// `(offset in bits, whether the last is a bit field)` of `struct.field[.field]`.
    fn resolve(&self, path: &str) -> Result<(u32, bool), BtfError> {
        let mut parts = path.split('.');
        let root = parts.next().unwrap_or_default();
        let mut id = self
            .find(&[kind::STRUCT, kind::UNION], root.as_bytes())
            .ok_or_else(|| BtfError::NoType(format!("struct {root}")))?;
        let (mut bits, mut bit_field) = (0_u32, false);
        for part in parts {
            let missing = || BtfError::NoField(path.to_owned());
            let (at, ty, field) = self.member(id, part.as_bytes(), DEPTH).ok_or_else(missing)?;
            bits = bits.checked_add(at).ok_or_else(missing)?;
            id = self.strip(ty).ok_or_else(missing)?.0;
            bit_field = field;
        }
        Ok((bits, bit_field))
    }

    /// The byte offset of `struct.field[.field]`.
    pub fn offset(&self, path: &str) -> Result<u32, BtfError> {
        match self.resolve(path)? {
            (bits, false) if bits % 8 == 0 => Ok(bits / 8),
            _ => Err(BtfError::BitField(path.to_owned())),
        }
    }

    /// The byte offset and the mask of a field that is one bit wide, as a little-endian machine has it.
    pub fn bit(&self, path: &str) -> Result<(u32, u32), BtfError> {
        let (bits, _) = self.resolve(path)?;
        Ok((bits / 8, 1 << (bits % 8)))
    }

    /// The first of these paths that this kernel has; the error names the first.
    pub fn offset_of_any(&self, paths: &[&str]) -> Result<u32, BtfError> {
        let mut first = None;
        for p in paths {
            match self.offset(p) {
                Ok(o) => return Ok(o),
                Err(e) => first = first.or(Some(e)),
            }
        }
        Err(first.unwrap_or_else(|| BtfError::NoField(String::new())))
    }

    /// How many arguments `tp_btf` programs get at a tracepoint (the typedef `btf_trace_NAME` has one more: the
    /// `void *` that the kernel passes first); None if there is no such tracepoint.
    #[must_use]
    pub fn tracepoint_args(&self, name: &str) -> Option<usize> {
        let typedef = self.get(self.find(&[kind::TYPEDEF], format!("btf_trace_{name}").as_bytes())?)?;
        let pointer = self.get(typedef.size_or_id)?;
        let proto = self.get(pointer.size_or_id)?;
        (proto.kind() == kind::FUNC_PROTO).then(|| proto.vlen().saturating_sub(1))
    }

    /// Whether the kernel has a function of this name that BTF knows (`bpf_iter_task`: the iterator is there).
    #[must_use]
    pub fn has_function(&self, name: &str) -> bool {
        self.find(&[kind::FUNC], name.as_bytes()).is_some()
    }
}

fn string(strings: &[u8], at: u32) -> &[u8] {
    let s = strings.get(at as usize..).unwrap_or_default();
    &s[..s.iter().position(|&c| c == 0).unwrap_or(s.len())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A BTF made by hand: `struct out { int a; struct { int b; u8 c:3; }; T in; }`, `typedef struct in { long x; } T`.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0out\0a\0b\0c\0in\0x\0T\0btf_trace_t\0bpf_iter_task\0";
        let at = |s: &str| {
            let mut needle = vec![0];
            needle.extend_from_slice(s.as_bytes());
            needle.push(0);
            strings.windows(needle.len()).position(|w| w == needle).unwrap() as u32 + 1
        };
        let k = |kind: u32, vlen: u32| kind << 24 | vlen;
        let mut w: Vec<u32> = Vec::new();
        w.extend([at("int"), k(1, 0), 4, 32]); // 1
        w.extend([at("in"), k(4, 1), 8, at("x"), 1, 0]); // 2
        w.extend([at("T"), k(8, 0), 2]); // 3
        w.extend([0, k(4, 2) | 1 << 31, 8, at("b"), 1, 0, at("c"), 1, 3 << 24 | 32]); // 4
        w.extend([at("out"), k(4, 3), 24, at("a"), 1, 0, 0, 4, 32, at("in"), 3, 96]); // 5
        w.extend([0, k(13, 3), 0, 0, 0, 0, 1, 0, 1]); // 6: (void *, int, int)
        w.extend([0, k(2, 0), 6]); // 7
        w.extend([at("btf_trace_t"), k(8, 0), 7]); // 8
        w.extend([at("bpf_iter_task"), k(12, 1), 6]); // 9
        let types: Vec<u8> = w.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let mut b = Vec::new();
        b.extend(0xeb9f_u16.to_ne_bytes());
        b.extend([1, 0]);
        for n in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            b.extend(n.to_ne_bytes());
        }
        b.extend(types);
        b.extend(strings);
        b
    }

    #[test]
    fn offsets_through_anonymous_structs_and_typedefs() {
        let bytes = sample();
        let b = Btf::parse(&bytes).unwrap();
        assert_eq!(b.offset("out.a"), Ok(0));
        assert_eq!(b.offset("out.b"), Ok(4));
        assert_eq!(b.offset("out.in.x"), Ok(12));
        assert_eq!(b.offset("out.c"), Err(BtfError::BitField("out.c".into())));
        assert_eq!(b.bit("out.c"), Ok((8, 1)));
        assert_eq!(b.offset("out.no"), Err(BtfError::NoField("out.no".into())));
        assert_eq!(b.offset("out.a.x"), Err(BtfError::NoField("out.a.x".into())));
        assert_eq!(b.offset("no.a"), Err(BtfError::NoType("struct no".into())));
        assert_eq!(b.offset_of_any(&["out.no", "out.b"]), Ok(4));
        assert_eq!(b.offset_of_any(&["out.no", "no.b"]), Err(BtfError::NoField("out.no".into())));
        assert_eq!(b.tracepoint_args("t"), Some(2));
        assert_eq!(b.tracepoint_args("u"), None);
        assert!(b.has_function("bpf_iter_task") && !b.has_function("bpf_iter"));
    }

    #[test]
    fn cut_anywhere_it_is_an_error() {
        let bytes = sample();
        for n in 0..bytes.len() {
            assert!(Btf::parse(&bytes[..n]).is_err(), "{n}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(flips in proptest::collection::vec((0_usize..400, any::<u8>()), 0..12)) {
            let mut bytes = sample();
            for (at, v) in flips {
                let n = bytes.len();
                bytes[at % n] = v;
            }
            if let Ok(b) = Btf::parse(&bytes) {
                let _ = (b.offset("out.in.x"), b.offset("out.c"), b.tracepoint_args("t"), b.has_function("x"));
            }
        }
    }
}
