//! A process whose argv lies on a page that never comes: a file of a FUSE file system of its own, whose server answers no read. Whoever
//! reads /proc/PID/cmdline waits until the server is gone. It has a zombie child, and goes on as user 65534. The server ends with it, and
//! by itself after some seconds, so that no other program of this host waits longer. The mount is in a mount namespace of its own.

use std::ffi::CString;
use std::io::{Error, Result};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use jobwarden_tests::shape::{bounded, fork, quit, say, step};

/// Seconds until the server ends whatever happens.
const SERVER_LIFE: u32 = 25;
const USER: libc::uid_t = 65_534;
const PAGE: usize = 4096;

// include/uapi/linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FILE: u64 = 2;

fn check(result: libc::c_int) -> Result<libc::c_int> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

/// `struct fuse_attr` of the root or of the file.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) =
        if node == FILE { (libc::S_IFREG | 0o444, PAGE as u64) } else { (libc::S_IFDIR | 0o755, 0) };
    let mut b = Vec::new();
    for n in [node, size, 8, 0, 0, 0] {
        b.extend(n.to_ne_bytes());
    }
    for n in [0_u32, 0, 0, mode, 1, 0, 0, 0, PAGE as u32, 0] {
        b.extend(n.to_ne_bytes());
    }
    b
}

/// The answer to a request; None: there is none.
fn answer(opcode: u32, node: u64) -> Option<std::result::Result<Vec<u8>, i32>> {
    let hour = 3600_u64.to_ne_bytes();
    let zeros = |n| vec![0_u8; n];
    Some(Ok(match opcode {
        // Version 7.31, no options, 4096 bytes at a time.
        INIT => {
            [&7_u32.to_ne_bytes()[..], &31_u32.to_ne_bytes(), &zeros(12), &4096_u32.to_ne_bytes(), &zeros(40)]
                .concat()
        }
        LOOKUP => [&FILE.to_ne_bytes()[..], &zeros(8), &hour, &hour, &zeros(8), &attributes(FILE)].concat(),
        GETATTR => [&hour[..], &zeros(8), &attributes(node)].concat(),
        OPEN => zeros(16),
        READ | FORGET | BATCH_FORGET | INTERRUPT => return None,
        _ => return Some(Err(libc::ENOSYS)),
    }))
}

fn serve(fuse: libc::c_int) -> i32 {
    // SAFETY: no memory effects.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::signal(libc::SIGALRM, libc::SIG_DFL);
        libc::alarm(SERVER_LIFE);
    }
    let mut request = vec![0_u8; 1 << 17];
    loop {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(fuse, request.as_mut_ptr().cast(), request.len()) };
        if n < 40 {
            return 1;
        }
        let u32_at = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap_or_default());
        let node = u64::from_ne_bytes(request[16..24].try_into().unwrap_or_default());
        let Some(answer) = answer(u32_at(4), node) else { continue };
        let (error, body) = answer.map_or_else(|e| (-e, Vec::new()), |b| (0, b));
        let mut reply = (16 + body.len() as u32).to_ne_bytes().to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(&request[8..16]);
        reply.extend(body);
        // SAFETY: the buffer is valid for its length.
        unsafe { libc::write(fuse, reply.as_ptr().cast(), reply.len()) };
    }
}

fn mount(dir: &Path) -> Result<libc::c_int> {
    let target = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: valid C strings throughout.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        let private = libc::MS_REC | libc::MS_PRIVATE;
        check(libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()))?;
        let fuse = check(libc::open(c"/dev/fuse".as_ptr(), libc::O_RDWR))?;
        let options = CString::new(format!("fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other"))?;
        check(libc::mount(c"test".as_ptr(), target.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()))?;
        Ok(fuse)
    }
}

/// Moves this process's argv, as /proc shows it, to the first page of the file.
fn move_argv(file: &Path) -> Result<()> {
    use std::os::fd::AsRawFd as _;
    let file = std::fs::File::open(file)?;
    // SAFETY: a new mapping, which nothing here touches.
    let page = unsafe {
        libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
    };
    if page == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    for (what, at) in
        [(libc::PR_SET_MM_ARG_START, page as usize), (libc::PR_SET_MM_ARG_END, page as usize + PAGE)]
    {
        // SAFETY: only what /proc shows is changed.
        check(unsafe { libc::prctl(libc::PR_SET_MM, what as libc::c_ulong, at, 0_usize, 0_usize) })?;
    }
    Ok(())
}

fn main() {
    bounded();
    let Some(dir) = std::env::args_os().nth(1) else { quit(2) };
    let dir = Path::new(&dir);
    let fuse = match mount(dir) {
        Ok(fuse) => fuse,
        Err(e) => return say("failed", e),
    };
    fork(|| serve(fuse));
    // SAFETY: a valid descriptor. The server alone has it from here on.
    unsafe { libc::close(fuse) };
    if let Err(e) = move_argv(&dir.join("page")) {
        return say("failed", e);
    }
    // SAFETY: no memory effects.
    if unsafe { libc::setresgid(USER, USER, USER) | libc::setresuid(USER, USER, USER) } != 0 {
        return say("failed", Error::last_os_error());
    }
    let zombie = fork(|| 0);
    say("zombie", zombie);
    step();
}
