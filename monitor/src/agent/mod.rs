//! The agent: wiring only. Everything is made in one order and stopped in the reverse one; a failure on the way is the
//! start's error, and nothing half-starts.

mod alert_causes;
mod capacity;
mod cause_cache;
mod core;
mod effects;
mod event_loop;
mod intake;
mod kills;
mod lineage_map;
mod message;
mod messages;
mod missed_reaps;
mod options;
mod proc_poll;
mod proc_reader;
mod recorded_engine;
mod replies;
mod requests;
mod resync;
mod rule_check;
mod saving;
mod scrape;
mod service_manager;
mod storage;
mod sync;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use self::cause_cache::CauseCache;
use self::core::{Core, ProcReads, Reloads, wall_seconds};
use self::event_loop::EventLoop;
use self::message::Message;
use self::missed_reaps::MissedReaps;
pub use self::options::{AgentError, Options};
use self::proc_reader::ProcReader;
use self::recorded_engine::RecordedEngine;
use self::service_manager::ServiceManager;
use self::storage::Storage;
use self::sync::Sync;
use crate::api::{self, Backend, Feed, Listeners, Readiness, Server};
use crate::config::Config;
use crate::enforce::{self, Audit, Enforcer};
use crate::engine::{Input, Output, Settings};
use crate::metrics::Counts;
use crate::model::key::Key;
use crate::notify::{self, AlertService, Submission};
use crate::privileges;
use crate::recording;
use crate::redact::Redactor;
use crate::sources::host;
use crate::sources::kernel::{self, Kernel, Tracer};
use crate::sources::proc::{self, Proc};
use crate::state::{State, StateDir, StateWriter, Store};
use crate::why::Holders;
use crate::why::holders::NS_PER_TICK;

/// tokio adds it to the clock, so it must not overflow.
const FOREVER: Duration = Duration::from_hours(10 * 365 * 24);
/// How long deliveries under way may take at a stop; what is left is sent after the next start.
const DRAIN: Duration = Duration::from_secs(2);
/// Requests that wait for the core; more are refused by the server's own bounds before.
const REQUESTS: usize = 256;

/// Runs the agent in the foreground until SIGTERM or SIGINT.
///
/// The core has this thread and a runtime of its own, which waits for the ring and for the clock right here. A runtime of several
/// threads has one of them wait for all, and wake the others: two switches more at each turn of the core.
pub fn run(options: Options) -> Result<(), AgentError> {
    let begun = Privileged::new(&options)?;
    options.log.start().map_err(AgentError::Log)?;
    let others = background_runtime().map_err(AgentError::Runtime)?;
    rule_check::log_warnings(&options.config, others.handle());
    let own =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AgentError::Runtime)?;
    let done = others.block_on(serve(options, begun)).and_then(|(event_loop, background)| {
        own.block_on(async {
            let done = Box::pin(event_loop.run()).await;
            background.end().await;
            done
        })
    });
    // Facts of a process that blocks its readers may never come: nobody waits for them.
    others.shutdown_timeout(Duration::from_millis(200));
    done
}

/// tokio panics where it cannot make its threads (a limit of processes), and where it has made the first but not the second it then
/// waits for the first for ever: the panic's message is the error here, and nobody waits for the thread that builds.
fn background_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let (sender, done) = std::sync::mpsc::channel();
    let build = {
        let sender = sender.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .max_blocking_threads(16)
                .thread_keep_alive(FOREVER)
                .thread_name("jobwarden")
                .enable_all()
                .build();
            // With one thread for blocking work, more of it waits for that thread where no other can be made later. Without any, tokio
            // panics in whoever asks, which may be the core.
            let runtime = runtime.inspect(|r| drop(r.spawn_blocking(|| ())));
            let _ = sender.send(runtime);
        }
    };
    // No other thread runs yet that could panic meanwhile.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let why = panic.payload().downcast_ref::<String>().cloned().unwrap_or_else(|| "it panicked".into());
        let _ = sender.send(Err(std::io::Error::other(why)));
    }));
    let runtime = std::thread::Builder::new()
        .name("jobwarden-build".into())
        .spawn(build)
        .and_then(|_| done.recv().unwrap_or_else(|e| Err(std::io::Error::other(e))));
    std::panic::set_hook(hook);
    runtime
}

/// What needs privileges that are given up then: made by the one thread that there is.
struct Privileged {
    /// This agent's alone while it runs.
    state_dir: StateDir,
    boot_id: String,
    saved: Option<State>,
    audit: Arc<Audit>,
    recorder: Option<recording::Recorder>,
    listeners: Listeners,
    kernel: Arc<Kernel>,
    tracer: Option<Tracer>,
}

impl Privileged {
    fn new(options: &Options) -> Result<Self, AgentError> {
        let agent = &options.config.agent;
        let (state_dir, trouble) = StateDir::open(&agent.state_dir)?;
        if let Some(e) = trouble {
            tracing::error!(error = %e, "the agent runs without a state directory; it is tried again each second");
        }
        let dir = state_dir.path();
        let boot_id = host::boot_id().map_err(|source| AgentError::Host { what: "boot id", source })?;
        let loaded = Store::new(&dir).load(&boot_id);
        for damage in &loaded.damage {
            tracing::error!("{damage}; jobs and the operator's word of before may be lost");
        }
        let audit = Audit::open(&dir);
        let recorder = options.record.as_deref().map(recording::Recorder::create).transpose()?;
        // Listening first: a socket or port in use ends the start before anything is loaded.
        let listeners = Listeners::bind(&api::Options::new(agent, crate::VERSION))?;
        let kernel = Arc::new(Kernel::start(&kernel_options(options))?);
        let tracer = options.trace_probes.then(|| kernel.tracer().map_err(AgentError::Trace)).transpose()?;
        // Threads that are made later inherit it.
        if let Err(error) = enforce::preferred() {
            tracing::warn!(%error, "the agent has no preference by the scheduler: a fork bomb delays its own end");
        }
        let written: Vec<&Path> = agent.socket.parent().into_iter().chain([dir.as_path()]).collect();
        let left = privileges::drop_capabilities(&|| kernel.self_test(), &written)?;
        tracing::info!(
            kept = left.kept.join(","),
            bounding = left.bounding,
            "other capabilities are given up"
        );
        let saved = loaded.state;
        Ok(Self { state_dir, boot_id, saved, audit: Arc::new(audit), recorder, listeners, kernel, tracer })
    }
}

/// What runs beside the core, and ends after it.
struct BackgroundTasks {
    _state_dir: Arc<StateDir>,
    stores: JoinHandle<()>,
    server: Server,
    delivery: JoinHandle<()>,
    center: AlertService,
}

impl BackgroundTasks {
    async fn end(self) {
        self.stores.abort();
        self.server.stop().await;
        // All that the core has said is on the disk before the delivery stops.
        let _ = self.delivery.await;
        self.center.stop(DRAIN).await;
        tracing::info!("stopped");
    }
}

async fn serve(mut options: Options, begun: Privileged) -> Result<(EventLoop, BackgroundTasks), AgentError> {
    let Privileged { state_dir, boot_id, saved, audit, recorder, listeners, kernel, tracer } = begun;
    let config = options.config.clone();
    let state_dir = Arc::new(state_dir);
    let dir = state_dir.path();
    let (requests_tx, requests) = mpsc::channel(REQUESTS);
    let (messages_tx, messages) = mpsc::unbounded_channel();
    let start = Readiness { ready: false, reasons: vec!["the first snapshot is not taken yet".into()] };
    let (ready, ready_rx) = watch::channel(start);
    let page = Arc::new(scrape::Page::new(messages_tx.clone(), options.log.clone()));
    let backend = Backend { requests: requests_tx, metrics: page.provider(), ready: ready_rx };
    let server = Server::serve(listeners, &api::Options::new(&config.agent, crate::VERSION), &backend)?;
    options.listening = server.tcp_address();
    page.set_connections(server.connections());
    page.set_kernel(Arc::clone(&kernel));
    if let Some(tracer) = tracer {
        tokio::spawn(log_probe_lines(tracer));
    }
    let center = AlertService::start(&config, &dir, notify::Clock::system())?;
    page.set_center(center.clone());
    let watch = capacity::watch(Arc::clone(&kernel), center.clone(), Arc::clone(&page), messages_tx.clone());
    let stores = tokio::spawn(watch);
    let (alerts_tx, alerts) = mpsc::unbounded_channel();
    let delivery = tokio::spawn(deliver(center.clone(), alerts, messages_tx.clone()));

    let writer = state_writer(&state_dir, messages_tx.clone())?;
    proc::blocking::keep_one();
    let proc = Proc::default();
    let redact = Arc::new(Redactor::new(config.agent.redact.clone()));
    let of_this_boot = saved.as_ref().filter(|s| s.boot_id == boot_id);
    let (lost, kills) = of_this_boot.map_or_else(Default::default, |s| (s.lost, s.kills.clone()));
    let engine = engine(&config, &boot_id, &kernel, &center, saved, recorder).await;
    leftovers(&kernel, &engine);
    let proc_reader = ProcReader::new(proc.clone());
    let core = Core {
        engine,
        queue: Output::default(),
        causes: CauseCache::new(proc_reader.clone(), Arc::clone(&kernel) as Arc<dyn Holders>),
        proc_reader,
        enforcer: Enforcer {
            lineage: Arc::clone(&kernel) as Arc<dyn enforce::Lineage>,
            proc,
            audit: Arc::clone(&audit),
            redact: Arc::clone(&redact),
        },
        audit,
        alert_service: center.clone(),
        submissions: alerts_tx,
        redact,
        feed: Feed::default(),
        counts: Counts { reload_ok: true, reload_at: wall_seconds(), ..Counts::default() },
        started: host::boot_now(),
        boot_id,
        ready,
        messages: messages_tx,
        background: Handle::current(),
        awaiting_cause: HashMap::new(),
        cgroups: HashMap::new(),
        kills: (0..).zip(kills).collect(),
        service_manager: ServiceManager::from_env(),
        writer,
        storage: Storage::default(),
        reloads: Reloads::default(),
        // So that a disk that takes nothing is known from the start.
        state_dirty: true,
        sync_needed: false,
        proc_reads: ProcReads::default(),
        read_to: 0,
        sync: Sync { lost: if kernel.from_pins() { lost } else { 0 }, ..Sync::default() },
        reaps: MissedReaps::default(),
        kernel,
        config,
        options,
    };
    let (stop, reload) = signals()?;
    let listening = server.tcp_address().map(|a| a.to_string());
    tracing::info!(listen = listening, socket = %core.config.agent.socket.display(), "started");
    let event_loop = EventLoop { core, requests, messages, stop, reload };
    Ok((event_loop, BackgroundTasks { _state_dir: state_dir, stores, server, delivery, center }))
}

async fn log_probe_lines(tracer: Tracer) {
    if let Err(e) = tracer.run().await {
        tracing::warn!(error = %e, "the probes' own lines are no longer shown");
    }
}

/// Starts the thread that writes the state. It also reports damaged files of the other stores.
fn state_writer(
    dir: &Arc<StateDir>,
    messages: mpsc::UnboundedSender<Message>,
) -> Result<StateWriter, AgentError> {
    let path = dir.path();
    let others = move || notify::damaged(&path).into_iter().chain(enforce::audit::damaged(&path)).collect();
    let report = move |report| {
        // Fails only when the core has ended.
        let _ = messages.send(Message::Saved(report));
    };
    StateWriter::start(Arc::clone(dir), others, report).map_err(AgentError::Thread)
}

/// How many alerts are written in one transaction when they come faster than the disk.
const TOGETHER: usize = 256;

/// Hands alerts over in the core's order, those that wait together, and tells the core whether the disk takes them: what it
/// refused it may take later without another alert.
async fn deliver(
    center: AlertService,
    mut alerts: mpsc::UnboundedReceiver<Submission>,
    core: mpsc::UnboundedSender<Message>,
) {
    let mut error = center.storage_error();
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            n = alerts.recv_many(&mut batch, TOGETHER) => {
                if n == 0 {
                    return;
                }
                if let Err(e) = center.submit_each(std::mem::take(&mut batch)).await {
                    tracing::error!(error = %e, "an alert is not on the disk");
                }
            }
            // Only where it is another one: an alert about storage that cannot be stored is not told again.
            Ok(()) = error.changed() => {
                let _ = core.send(Message::AlertStorage(error.borrow_and_update().clone()));
            }
        }
    }
}

fn kernel_options(o: &Options) -> kernel::Options {
    kernel::Options {
        bpffs: o.config.agent.pin.then(|| o.config.agent.bpffs.clone()),
        trace: o.trace_probes,
        ring_bytes: o.config.agent.ring_bytes,
        lineage_entries: Some(o.config.agent.lineage_entries).filter(|&n| n != 0),
        ..kernel::Options::default()
    }
}

/// The engine, with what was saved.
async fn engine(
    config: &Config,
    boot_id: &str,
    kernel: &Kernel,
    center: &AlertService,
    saved: Option<State>,
    recorder: Option<recording::Recorder>,
) -> RecordedEngine {
    let pid = std::process::id();
    let settings = Settings {
        host: host::hostname(),
        machine_id: host::machine_id(),
        boot_id: boot_id.to_owned(),
        agent: Key::new(pid, own_start(kernel, pid)),
        pid_ns: host::pid_ns().ok(),
        users: host::users(),
        boot_to_wall_ns: host::boot_to_wall().cast_signed(),
        ..Settings::default()
    };
    let mut engine = RecordedEngine::new(settings, config, recorder);
    let now = host::boot_now();
    let mut out = Output::default();
    let same_boot = saved.as_ref().is_none_or(|s| s.boot_id == boot_id);
    if let Some(s) = saved {
        let s = if same_boot { s } else { s.on_another_boot(boot_id, host::boot_to_wall()) };
        engine.handle(Input::RestoreEnforcement(Cow::Owned(s.enforcement)), now, &mut out);
        engine.handle(Input::RestoreJobs(s.jobs.into()), now, &mut out);
    }
    engine.handle(
        Input::RestoreAlerts { alerts: center.restore().await.into(), this_boot: same_boot },
        now,
        &mut out,
    );
    engine
}

/// An agent that was killed in the middle of a job's end leaves dooms, flags and jobs of its own in the pinned maps. Before
/// the ring is read: a job whose registration it did not get to save is registered anew by the record that is still there.
fn leftovers(kernel: &Kernel, engine: &RecordedEngine) {
    let known = engine.job_records().iter().map(|r| r.number).collect();
    match kernel.take_leftovers_away(&known) {
        Ok(0) => {}
        Ok(jobs) => tracing::info!(jobs, "what an earlier agent left unfinished is forgotten"),
        Err(e) => tracing::error!(error = %e, "what an earlier agent left unfinished stays in the kernel"),
    }
}

/// The agent's start in full nanoseconds, or as /proc has it.
fn own_start(kernel: &Kernel, pid: u32) -> u64 {
    match crate::enforce::Lineage::start_of(kernel, pid) {
        Ok(Some(start)) => start,
        _ => Proc::default().stat(pid).map_or(0, |s| s.start_ticks * NS_PER_TICK),
    }
}

/// SIGTERM and SIGINT stop, SIGHUP reloads.
fn signals() -> Result<(watch::Receiver<bool>, mpsc::Receiver<()>), AgentError> {
    let (stop_sender, stop) = watch::channel(false);
    let (reload_sender, reload) = mpsc::channel(1);
    let on = |kind| signal(kind).map_err(AgentError::Signals);
    let (mut term, mut int, mut hup) =
        (on(SignalKind::terminate())?, on(SignalKind::interrupt())?, on(SignalKind::hangup())?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => break,
                _ = int.recv() => break,
                _ = hup.recv() => {
                    // If one is waiting already, that one will do.
                    let _ = reload_sender.try_send(());
                }
            }
        }
        let _ = stop_sender.send(true);
    });
    Ok((stop, reload))
}
