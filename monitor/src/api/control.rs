//! The control socket's routes: JSON in, a [`Request`] to the core, JSON out. Who may do what is decided here.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRef, FromRequestParts, Query, Request as HttpRequest, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Frame;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use super::admission::{Account, Owner, StreamPermit};
use super::connection::Pieces;
use super::server::Backend;
use super::shared::SharedAnswers;
use super::wire::{AuditQuery, Causes, EnforcementBody, ExtendBody, NotifyBody, Resolved, seconds};
use super::{
    AlertQuery, ApiError, Class, EventFilter, ExecEnd, ExecRequest, ExecSignal, KillRequest, Peer, Reply,
    Request, Subscription, Target, TreeQuery, WhyQuery,
};
use crate::model::audience::Audience;
use crate::model::schema::is_job_name;
use crate::model::tree_rows::TreeRows;

/// How long the core may take for an answer that needs no waiting for processes.
const ANSWER: Duration = Duration::from_secs(30);
/// Bytes of a request's body.
const BODY: usize = 64 << 10;
/// What the JSON of a tree and of one of its processes mostly has room in, in bytes.
const TREE_HEAD: usize = 256;
const TREE_PROCESS: usize = 768;
/// How long a client may take to send them.
const BODY_TIME: Duration = Duration::from_secs(10);

type Core = mpsc::Sender<Request>;
type Trees = Arc<SharedAnswers<TreeQuery, Result<Bytes, ApiError>>>;

/// Of one processor's time, what the trees of readers may use together. Those of root are not bounded.
const READERS_SHARE: f64 = 0.2;
const ROOT_SHARE: f64 = 1e3;
/// A reader's tree costs one request more for each of these bytes, and at most [`SEARCH`].
const BYTES_A_REQUEST: f64 = 256e3;
/// Cost of a request that makes the core look at every process, in requests.
const SEARCH: f64 = 10.0;

#[derive(Clone)]
struct Api {
    core: Core,
    trees: Trees,
    reader_trees: Trees,
}

impl FromRef<Api> for Core {
    fn from_ref(api: &Api) -> Self {
        api.core.clone()
    }
}

pub(super) fn router(backend: &Backend) -> Router {
    Router::new()
        .route("/v1/ping", get(ping))
        .route("/v1/tree", get(tree))
        .route("/v1/jobs", get(jobs))
        .route("/v1/alerts", get(alerts))
        .route("/v1/events", get(events))
        .route("/v1/why", get(why))
        .route("/v1/status", get(status))
        .route("/v1/resolve", get(resolve))
        .route("/v1/audit", get(audit))
        .route("/v1/extend", post(extend))
        .route("/v1/kill", post(kill))
        .route("/v1/enforcement", post(enforcement))
        .route("/v1/reload", post(reload))
        .route("/v1/notify", post(notify))
        .route("/v1/exec", post(exec))
        .route("/v1/exec/end", post(exec_end))
        .route("/v1/exec/signal", post(exec_signal))
        .fallback(|| async {
            ApiError::new(Class::Usage, "no-such-request", "the agent knows no such request")
                .hint("client and agent are of different versions: see `jobwarden status` and `--version`")
        })
        .method_not_allowed_fallback(|| async { ApiError::usage("that method is not for this request") })
        .with_state(Api {
            core: backend.requests.clone(),
            trees: SharedAnswers::new(ROOT_SHARE),
            reader_trees: SharedAnswers::new(READERS_SHARE),
        })
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.class.http_status());
        (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), Json(self.body())).into_response()
    }
}

/// The peer, who may change something. A handler that takes this cannot forget to ask.
struct Privileged(Peer);

impl<S: Sync> FromRequestParts<S> for Privileged {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match parts.extensions.get::<Peer>() {
            Some(p) if p.privileged => Ok(Self(p.clone())),
            Some(p) if p.uid == 0 => Err(ApiError::new(
                Class::Denied,
                "not-permitted",
                "only root in the agent's own pid namespace may do this",
            )
            .hint("run it on the host, not in a container")),
            _ => Err(ApiError::new(Class::Denied, "not-permitted", "only root may do this")
                .hint("run it as root; members of agent.socket_group may only read")),
        }
    }
}

/// What may be shown to the peer. A connection without credentials is shown what everybody may see.
impl<S: Sync> FromRequestParts<S> for Audience {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get::<Peer>().map_or(Self::Nobody, Peer::audience))
    }
}

/// A query string, strictly read.
struct Args<T>(T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Args<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::try_from_uri(&parts.uri).map(|Query(t)| Self(t)).map_err(|e| ApiError::usage(e.body_text()))
    }
}

/// A body within bounds of size and time, as JSON.
async fn body<T: DeserializeOwned>(request: HttpRequest) -> Result<T, ApiError> {
    let read = Limited::new(request.into_body(), BODY).collect();
    let bytes = tokio::time::timeout(BODY_TIME, read)
        .await
        .map_err(|_| ApiError::usage("the request's body did not come within 10 s"))?
        .map_err(|e| match e.downcast_ref::<LengthLimitError>() {
            Some(_) => ApiError::usage(format!("the request's body has more than {BODY} bytes")),
            None => ApiError::usage(format!("the request's body broke off: {e}")),
        })?
        .to_bytes();
    serde_json::from_slice(&bytes).map_err(|e| ApiError::usage(format!("the request's body: {e}")))
}

/// Hands a request to the core and waits for its reply, at most `patience`.
async fn ask<T>(
    core: &Core,
    patience: Option<Duration>,
    make: impl FnOnce(Reply<T>) -> Request,
) -> Result<T, ApiError> {
    let (tx, rx) = oneshot::channel();
    core.try_send(make(tx)).map_err(|e| match e {
        mpsc::error::TrySendError::Full(_) => {
            ApiError::new(Class::Unavailable, "busy", "the agent has too many requests waiting")
                .hint("try again in a moment")
        }
        mpsc::error::TrySendError::Closed(_) => ApiError::stopping(),
    })?;
    let reply = match patience {
        None => rx.await,
        Some(p) => tokio::time::timeout(p, rx).await.map_err(|_| no_answer(p))?,
    };
    reply.map_err(|_| ApiError::stopping())?
}

fn no_answer(within: Duration) -> ApiError {
    ApiError::new(Class::Unavailable, "no-answer", format!("the agent did not answer within {within:?}"))
}

type Answer<T> = Result<Json<T>, ApiError>;

async fn ping(State(core): State<Core>) -> Answer<()> {
    ask(&core, Some(ANSWER), Request::Ping).await.map(Json)
}

/// Made once for all that ask for the same tree, readers apart from root: a flood of theirs does not delay its answers.
async fn tree(
    State(api): State<Api>,
    Extension(account): Extension<Arc<Account>>,
    audience: Audience,
    Args(q): Args<TreeQuery>,
) -> Result<Response, ApiError> {
    // Part of the key of a shared answer, so no reader gets the answer of another user.
    let q = TreeQuery { audience, ..q };
    let answer = async {
        let permit = Arc::clone(&account.answers).acquire_owned().await.map_err(|_| ApiError::stopping())?;
        let trees = if account.owner == Owner::Root { &api.trees } else { &api.reader_trees };
        let compute = {
            let (core, q) = (api.core.clone(), q.clone());
            move || tree_json(core, q)
        };
        let json = trees.get(q, compute).await.ok_or_else(ApiError::stopping)??;
        if account.owner != Owner::Root {
            account.rate.charge((json.len() as f64 / BYTES_A_REQUEST).min(SEARCH));
        }
        Ok((permit, json))
    };
    let (permit, json) = tokio::time::timeout(ANSWER, answer).await.map_err(|_| no_answer(ANSWER))??;
    let body = Body::new(Pieces::new(json, permit));
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

async fn tree_json(core: Core, q: TreeQuery) -> Result<Bytes, ApiError> {
    let mut tree = ask(&core, Some(ANSWER), |r| Request::Tree(q.clone(), r)).await?;
    if let Some(c) = &q.container {
        super::wire::only_container(&mut tree, c);
    }
    let made = tokio::task::spawn_blocking(move || {
        // In one piece of memory: a buffer that grows to megabytes is copied again and again.
        let mut json = Vec::with_capacity(TREE_HEAD + tree.processes.len() * TREE_PROCESS);
        let written = if q.rows {
            serde_json::to_writer(&mut json, &TreeRows::from(&tree))
        } else {
            serde_json::to_writer(&mut json, &tree)
        };
        // The answer does not wait until so many small pieces are freed.
        tokio::task::spawn_blocking(move || drop(tree));
        written.map(|()| Bytes::from(json))
    });
    let failed = |e: &dyn std::fmt::Display| ApiError::failed(format!("the answer's JSON: {e}"));
    made.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
}

async fn jobs(State(core): State<Core>) -> Answer<crate::model::schema::Jobs> {
    ask(&core, Some(ANSWER), Request::Jobs).await.map(Json)
}

async fn alerts(
    State(core): State<Core>,
    audience: Audience,
    Args(q): Args<AlertQuery>,
) -> Answer<crate::model::schema::Alerts> {
    let q = AlertQuery { audience, ..q };
    if let Some(s) = q.since_s {
        seconds("since", s)?;
    }
    ask(&core, Some(ANSWER), |r| Request::Alerts(q, r)).await.map(Json)
}

async fn why(
    State(core): State<Core>,
    Extension(account): Extension<Arc<Account>>,
    audience: Audience,
    Args(q): Args<WhyQuery>,
) -> Answer<Causes> {
    let q = WhyQuery { audience, ..q };
    if q.container.is_some() {
        account.rate.charge(SEARCH);
    }
    ask(&core, Some(ANSWER), |r| Request::Why(q, r)).await.map(Json)
}

async fn status(State(core): State<Core>) -> Answer<super::Status> {
    ask(&core, Some(ANSWER), Request::Status).await.map(Json)
}

#[derive(Deserialize)]
struct ResolveQuery {
    target: Target,
}

async fn resolve(State(core): State<Core>, Args(q): Args<ResolveQuery>) -> Answer<Resolved> {
    ask(&core, Some(ANSWER), |r| Request::Resolve(q.target, r))
        .await
        .map(|matches| Json(Resolved { matches }))
}

async fn audit(
    State(core): State<Core>,
    Privileged(_): Privileged,
    Args(q): Args<AuditQuery>,
) -> Answer<super::AuditLines> {
    let since = q.since_s.map(|s| seconds("since", s)).transpose()?;
    ask(&core, Some(ANSWER), |reply| Request::Audit { since, job: q.job, reply }).await.map(Json)
}

async fn extend(
    State(core): State<Core>,
    Privileged(peer): Privileged,
    request: HttpRequest,
) -> Answer<super::ExtendReply> {
    let b: ExtendBody = body(request).await?;
    let by = seconds("by", b.by_s)?;
    ask(&core, Some(ANSWER), |reply| Request::Extend { job: b.job, by, peer, reply }).await.map(Json)
}

async fn kill(
    State(core): State<Core>,
    Privileged(peer): Privileged,
    request: HttpRequest,
) -> Answer<crate::model::schema::KillReport> {
    let kill: KillRequest = body(request).await?;
    if let Some(g) = kill.grace_s {
        seconds("grace", g)?;
    }
    if kill.signal.is_some_and(|s| !(1..=crate::model::signal::MAX).contains(&s)) {
        return Err(ApiError::usage("signal: expected a number from 1 to 64"));
    }
    // As long as its grace and its members take; a client that goes away does not stop it.
    ask(&core, None, |reply| Request::Kill { kill, peer, reply }).await.map(Json)
}

async fn enforcement(
    State(core): State<Core>,
    Privileged(peer): Privileged,
    request: HttpRequest,
) -> Answer<super::EnforcementStatus> {
    let b: EnforcementBody = body(request).await?;
    let lasting = b.for_s.map(|s| seconds("for", s)).transpose()?;
    ask(&core, Some(ANSWER), |reply| Request::Enforcement { on: b.on, lasting, peer, reply }).await.map(Json)
}

async fn reload(State(core): State<Core>, Privileged(peer): Privileged) -> Answer<super::Reloaded> {
    ask(&core, Some(ANSWER), |reply| Request::Reload { peer, reply }).await.map(Json)
}

async fn notify(
    State(core): State<Core>,
    Privileged(peer): Privileged,
    request: HttpRequest,
) -> Answer<super::Notified> {
    let NotifyBody { receiver } = body(request).await?;
    // The receiver's own timeout ends it.
    ask(&core, None, |reply| Request::Notify { receiver, peer, reply }).await.map(Json)
}

async fn exec(
    State(core): State<Core>,
    Privileged(peer): Privileged,
    request: HttpRequest,
) -> Answer<super::ExecRegistered> {
    let exec: ExecRequest = body(request).await?;
    if !is_job_name(&exec.name) {
        return Err(ApiError::usage("name: expected 1 to 64 letters, digits, '_', '.' and '-'"));
    }
    ask(&core, Some(ANSWER), |reply| Request::ExecRegister { exec, peer, reply }).await.map(Json)
}

async fn exec_end(
    State(core): State<Core>,
    Privileged(peer): Privileged,
    request: HttpRequest,
) -> Answer<super::ExecEnded> {
    let end: ExecEnd = body(request).await?;
    ask(&core, None, |reply| Request::ExecEnd { end, peer, reply }).await.map(Json)
}

async fn exec_signal(
    State(core): State<Core>,
    Privileged(peer): Privileged,
    request: HttpRequest,
) -> Answer<usize> {
    let signal: ExecSignal = body(request).await?;
    ask(&core, Some(ANSWER), |reply| Request::ExecSignal { signal, peer, reply }).await.map(Json)
}

async fn events(
    State(core): State<Core>,
    Extension(account): Extension<Arc<Account>>,
    audience: Audience,
    Args(q): Args<EventFilter>,
) -> Result<Response, ApiError> {
    if let Some(s) = q.since_s {
        seconds("since", s)?;
    }
    let permit = account.open_stream().ok_or_else(|| {
        ApiError::new(
            Class::Unavailable,
            "too-many-streams",
            "too many event streams of this user, or of all users but root, are open",
        )
        .hint("close one: each `jobwarden events` is a stream")
    })?;
    let lines = ask(&core, Some(ANSWER), |r| Request::Events(q, r)).await?;
    let body = Body::new(Lines { lines, audience, _permit: permit });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// One JSON object a line, as long as the core and the client last.
struct Lines {
    lines: Subscription,
    audience: Audience,
    _permit: StreamPermit,
}

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = serde_json::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, serde_json::Error>>> {
        let audience = self.audience;
        self.lines.poll_recv(cx).map(|line| {
            line.map(|mut l| {
                audience.event_line(&mut l);
                let mut bytes = serde_json::to_vec(&l)?;
                bytes.push(b'\n');
                Ok(Frame::data(bytes.into()))
            })
        })
    }
}
