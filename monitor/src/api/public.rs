//! The TCP listener: what Prometheus and probes read. GET and HEAD only, and nothing that changes anything.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::sync::watch;

use super::server::{Backend, Options};
use super::shared::SharedAnswers;
use crate::metrics::encode::Format;

/// How long the core may take for one page.
const PAGE: Duration = Duration::from_secs(10);

/// Of one processor's time, what pages may use: the core gives its numbers for each.
const PAGES_SHARE: f64 = 0.25;

#[derive(Clone)]
struct Public {
    backend: Backend,
    pages: Arc<SharedAnswers<Format, Option<Bytes>>>,
    /// Why the control socket is out of reach, if it is.
    path_lost: watch::Receiver<Option<String>>,
}

pub(super) fn router(
    backend: &Backend,
    options: &Options,
    path_lost: watch::Receiver<Option<String>>,
) -> Router {
    let version = options.version.clone();
    let state = Public { backend: backend.clone(), pages: SharedAnswers::new(PAGES_SHARE), path_lost };
    Router::new()
        .route("/", get(move || async move { landing(&version) }))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(|| async { text(StatusCode::NOT_FOUND, "not found: see /\n") })
        .layer(middleware::from_fn(read_only))
        .with_state(state)
}

fn text(status: StatusCode, body: impl Into<String>) -> Response {
    let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::CACHE_CONTROL, "no-store")];
    (status, headers, body.into()).into_response()
}

async fn read_only(request: HttpRequest, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let mut r = text(StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD only; control is on the unix socket\n");
    r.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
    r
}

fn landing(version: &str) -> Response {
    let html = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>jobwarden</title>\
         <h1>jobwarden {version}</h1><ul>\
         <li><a href=/metrics>/metrics</a>: for Prometheus</li>\
         <li><a href=/healthz>/healthz</a>: the agent runs</li>\
         <li><a href=/readyz>/readyz</a>: it follows every process</li></ul>\
         <p>Everything else is on the control socket: <code>jobwarden status</code></p></html>\n"
    );
    axum::response::Html(html).into_response()
}

/// 200 as long as the core takes requests.
async fn healthz(State(public): State<Public>) -> Response {
    if public.backend.requests.is_closed() {
        return text(StatusCode::SERVICE_UNAVAILABLE, "the agent's core has ended\n");
    }
    text(StatusCode::OK, "ok\n")
}

async fn readyz(State(public): State<Public>) -> Response {
    let mut now = public.backend.ready.borrow().clone();
    now.reasons.extend(public.path_lost.borrow().clone());
    let mut body = String::from(if now.ready { "ready\n" } else { "not ready\n" });
    for reason in &now.reasons {
        body.push_str(reason);
        body.push('\n');
    }
    text(if now.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body)
}

async fn metrics(State(public): State<Public>, headers: HeaderMap) -> Response {
    let header = |name| headers.get(name).and_then(|v: &header::HeaderValue| v.to_str().ok());
    let format = Format::from_accept(header(header::ACCEPT));
    let compute = {
        let metrics = Arc::clone(&public.backend.metrics);
        move || async move { metrics(format).await.map(Bytes::from) }
    };
    let page = tokio::time::timeout(PAGE, public.pages.get(format, compute)).await;
    let Ok(Some(Some(page))) = page else {
        return text(
            StatusCode::SERVICE_UNAVAILABLE,
            "the agent's core gives no numbers: it is stopping or stuck\n",
        );
    };
    let mut response = page.clone().into_response();
    if header(header::ACCEPT_ENCODING).is_some_and(takes_gzip)
        && let Some(packed) = gzip(&page)
    {
        response = packed.into_response();
        response.headers_mut().insert(header::CONTENT_ENCODING, header::HeaderValue::from_static("gzip"));
    }
    let h = response.headers_mut();
    h.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(format.content_type()));
    h.insert(header::VARY, header::HeaderValue::from_static("Accept, Accept-Encoding"));
    response
}

/// RFC 9110 12.5.3: `gzip` or `*` is named, and not with `q=0`.
fn takes_gzip(accept: &str) -> bool {
    accept.split(',').any(|one| {
        let (coding, params) = one.split_once(';').unwrap_or((one, ""));
        let refused = params.trim().strip_prefix("q=").and_then(|q| q.trim().parse().ok()) == Some(0.0_f64);
        matches!(coding.trim(), "gzip" | "x-gzip" | "*") && !refused
    })
}

fn gzip(page: &[u8]) -> Option<Vec<u8>> {
    let mut out = GzEncoder::new(Vec::with_capacity(page.len() / 4), Compression::fast());
    out.write_all(page).ok()?;
    out.finish().ok()
}

#[cfg(test)]
mod tests {
    use super::takes_gzip;

    #[test]
    fn gzip_only_where_it_is_taken() {
        for yes in ["gzip", "deflate, gzip;q=0.5", "*", "br;q=1.0, gzip ; q=1"] {
            assert!(takes_gzip(yes), "{yes}");
        }
        for no in ["", "identity", "gzip;q=0", "gzip; q=0.0", "br"] {
            assert!(!takes_gzip(no), "{no}");
        }
    }
}
