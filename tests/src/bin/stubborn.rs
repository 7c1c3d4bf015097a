//! A family that ignores every signal that can be ignored: N children, each with a child in a session of its own.
//! It ends by SIGKILL, or by its alarm. With `quit` the program itself exits 0 and leaves them.

use jobwarden_tests::shape::{bounded, disposition, fork, nap, number, pid, say, setsid};

fn ignore() {
    for signal in 1..32 {
        if signal != libc::SIGALRM && signal != libc::SIGCHLD {
            disposition(signal, libc::SIG_IGN);
        }
    }
}

fn forever() -> ! {
    loop {
        nap(60_000);
    }
}

fn main() {
    bounded();
    ignore();
    let n = number(1, 1);
    for _ in 0..n {
        let child = fork(|| {
            let grandchild = fork(|| {
                setsid();
                say("ready", pid());
                forever()
            });
            say("grandchild", grandchild);
            forever()
        });
        say("child", child);
    }
    say("family", n);
    if std::env::args().any(|a| a == "quit") {
        return;
    }
    forever();
}
