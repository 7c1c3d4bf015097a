//! Doom and spare flags of orders that overlap, and what an agent that was killed leaves of them.

use std::collections::HashSet;
use std::io::Write as _;

use super::jobs::{MINUTE, OwnBpffs, Shell, expect_members, pids, wait_for};
use super::*;
use crate::enforce::OrderId;

#[tokio::test]
async fn orders_that_overlap_keep_their_marks() {
    let Some(kernel) = start("orders_that_overlap_keep_their_marks", &Options::default()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&kernel);
    let job = kernel.now();
    kernel.label(job, 0, root).unwrap();
    let (first, second) = (OrderId::fresh(), OrderId::fresh());
    for order in [first, second] {
        kernel.spare(root, true, order).unwrap();
        kernel.doom(job, kernel.now() + MINUTE, order).unwrap();
    }
    // Inherited, and marked by nobody.
    let child = shell.background("sleep 60");
    kernel.release(first).unwrap();
    // Doomed still, so one without the flag would die of its next system call.
    let flagged = |pid| kernel.members(job).unwrap().iter().any(|m| m.key.pid == pid && m.spared);
    assert!(kernel.doom_attached());
    assert!(flagged(root.pid) && flagged(child), "the second order spares them");
    assert_eq!(shell.ask("echo $(echo alive)"), "alive");
    kernel.release(second).unwrap();
    assert!(!kernel.doom_attached());
    assert!(!flagged(root.pid) && !flagged(child));
    // The longest doom holds, whoever renews his.
    kernel.doom(job, kernel.now() + MINUTE, first).unwrap();
    kernel.doom(job, kernel.now() - 1, second).unwrap();
    assert!(kernel.doom_attached());
    let _ = writeln!(shell.child.0.stdin.as_mut().unwrap(), "echo dead");
    wait_for("the shell's end", Duration::from_secs(30), || !pids(&kernel, job).contains(&root.pid));
    kernel.release(first).unwrap();
    assert!(!kernel.doom_attached());
    // It slept through its doom. SAFETY: started above, and of this test.
    unsafe { libc::kill(child as i32, libc::SIGKILL) };
}

/// Whoever changes a doom sees to `sys_enter`: it must be there while one is in force, whatever another thread does.
#[tokio::test]
async fn dooms_of_two_threads() {
    let Some(kernel) = start("dooms_of_two_threads", &Options::default()) else { return };
    // Nobody is in these jobs; it takes a while to read them all, in which the other thread dooms and undooms.
    let first = kernel.now();
    for id in first..first + 2000 {
        kernel.maps.jobs.put(&id, &monitor_abi::Job { id, ..Default::default() }).unwrap();
    }
    let detached = std::thread::scope(|scope| {
        let one = |job: u64| {
            let (kernel, mut detached) = (&kernel, 0);
            move || {
                for round in 0..60 {
                    let order = OrderId::fresh();
                    kernel.doom(job, kernel.now() + MINUTE, order).unwrap();
                    // Somebody who decided before this doom may act only now.
                    std::thread::sleep(Duration::from_micros(round * 170 % 4000));
                    detached += usize::from(!kernel.doom_attached());
                    kernel.release(order).unwrap();
                }
                detached
            }
        };
        let threads = [scope.spawn(one(first)), scope.spawn(one(first + 1))];
        threads.into_iter().map(|t| t.join().unwrap()).sum::<usize>()
    });
    assert_eq!(detached, 0, "doomed, and nobody would be killed");
    assert!(!kernel.doom_attached());
}

#[tokio::test]
async fn a_stop_ends_dooms_and_refuses_new_ones() {
    let Some(kernel) = start("a_stop_ends_dooms_and_refuses_new_ones", &Options::default()) else { return };
    let mut shell = Shell::new();
    let (job, order) = (kernel.now(), OrderId::fresh());
    kernel.label(job, 0, shell.key(&kernel)).unwrap();
    kernel.spare(shell.key(&kernel), true, order).unwrap();
    kernel.doom(job, kernel.now() + MINUTE, order).unwrap();
    kernel.stop_dooms().unwrap();
    assert!(!kernel.doom_attached());
    // The order's thread runs on and renews.
    assert!(kernel.doom(job, kernel.now() + MINUTE, order).is_err());
    assert!(!kernel.doom_attached());
    kernel.release(order).unwrap();
    assert_eq!(shell.ask("echo alive"), "alive");
}

/// What an order makes a job of for its own time falls back into the job that it came from.
#[tokio::test]
async fn a_job_for_the_time_of_an_order() {
    let Some(kernel) = start("a_job_for_the_time_of_an_order", &Options::default()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&kernel);
    let child = shell.background("sleep 60");
    let part = Key::new(child, kernel.start_of(child).unwrap().unwrap());
    let (job, one, two) = (kernel.now(), kernel.now() + 1, kernel.now() + 2);
    kernel.label(job, 0, root).unwrap();
    let all = HashSet::from([root.pid, child]);
    kernel.label_inside(one, part).unwrap();
    kernel.label_inside(two, part).unwrap();
    assert_eq!((pids(&kernel, one), pids(&kernel, two)), (HashSet::from([child]), HashSet::from([child])));
    expect_members(&kernel, job, &all);
    // The one around it ends first.
    kernel.forget(one).unwrap();
    expect_members(&kernel, job, &all);
    kernel.forget(two).unwrap();
    expect_members(&kernel, job, &all);
    assert_eq!(kernel.job_numbers().unwrap(), [(job, 0)]);
    // Outside of any job it is in none afterwards.
    kernel.forget(job).unwrap();
    kernel.label_inside(one, part).unwrap();
    kernel.forget(one).unwrap();
    assert_eq!(kernel.lineage_of(part).unwrap().map(|l| l.job), Some(0));
}

#[tokio::test]
async fn what_a_killed_agent_leaves() {
    let bpffs = OwnBpffs::new();
    let Some(first) = start("what_a_killed_agent_leaves", &bpffs.options()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&first);
    let child = shell.background("sleep 60");
    let part = Key::new(child, first.start_of(child).unwrap().unwrap());
    let (job, temporary, order) = (first.now(), first.now() + 1, OrderId::fresh());
    first.label(job, 0, root).unwrap();
    first.spare(root, true, order).unwrap();
    let inherited = shell.background("sleep 60");
    first.label_inside(temporary, part).unwrap();
    // Until it sleeps it enters system calls, and the doom is meant to find none here.
    wait_for("its sleep", Duration::from_secs(20), || {
        crate::sources::proc::Proc::default()
            .stat(child)
            .is_ok_and(|s| s.state == b'S' && s.comm.bytes() == b"sleep")
    });
    first.doom(job, first.now() + MINUTE, order).unwrap();
    first.doom(temporary, first.now() + MINUTE, order).unwrap();
    // As by SIGKILL: nobody takes his marks away.
    drop(first);
    let second = Kernel::start(&bpffs.options()).unwrap();
    assert!(second.from_pins() && second.doom_attached());
    assert!(second.members(job).unwrap().iter().any(|m| m.spared));
    assert_eq!(second.take_leftovers_away(&HashSet::from([job])).unwrap(), 1);
    assert!(!second.doom_attached());
    assert_eq!(second.job_numbers().unwrap(), [(job, 0)]);
    expect_members(&second, job, &HashSet::from([root.pid, child, inherited]));
    assert!(second.members(job).unwrap().iter().all(|m| !m.spared));
    assert_eq!(shell.ask("echo alive"), "alive");
    assert_eq!(second.take_leftovers_away(&HashSet::from([job])).unwrap(), 0);
}
