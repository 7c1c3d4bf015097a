//! Connections to receivers: TLS with the system's certificates or a receiver's own, kept alive between alerts, and through the
//! proxy that the environment names (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::Full;
use hyper::Uri;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::http::uri::Scheme;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tower_service::Service;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A pool of connections to one receiver.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    pub(super) pool: legacy::Client<HttpsConnector<Connector>, Full<Bytes>>,
    proxies: Arc<Matcher>,
}

impl Transport {
    /// With only `own` certificates trusted, or the system's without them.
    pub(super) fn new(
        own: Option<Vec<CertificateDer<'static>>>,
        timeout: Duration,
        proxies: Matcher,
    ) -> Result<Self, rustls::Error> {
        let mut roots = RootCertStore::empty();
        match own {
            Some(own) => own.into_iter().try_for_each(|c| roots.add(c))?,
            // Some hosts have none, or one that does not read: then only the receivers that need it fail, with that reason.
            None => _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        // Shared by the addresses of a name, so that one that is down does not take the time of all.
        tcp.set_connect_timeout(Some(timeout));
        let proxies = Arc::new(proxies);
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(Connector { tcp, proxies: Arc::clone(&proxies) });
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(90))
            .pool_max_idle_per_host(2)
            .build(connector);
        Ok(Self { pool, proxies })
    }

    /// What a proxy wants in each request; a tunnel asks for it by itself.
    pub(super) fn proxy_authorization(&self, to: &Uri) -> Option<HeaderValue> {
        let plain = to.scheme() == Some(&Scheme::HTTP);
        self.proxies.intercept(to).filter(|_| plain)?.basic_auth().cloned()
    }
}

/// Connects directly or through a proxy.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    tcp: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let mut tcp = self.tcp.clone();
        let proxy = self.proxies.intercept(&to);
        Box::pin(async move {
            let Some(proxy) = proxy else {
                return Ok(Stream { io: tcp.call(to).await?, proxied: false });
            };
            if to.scheme() == Some(&Scheme::HTTP) {
                return Ok(Stream { io: tcp.call(proxy.uri().clone()).await?, proxied: true });
            }
            let mut tunnel = Tunnel::new(proxy.uri().clone(), tcp);
            if let Some(authorization) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(authorization.clone());
            }
            Ok(Stream { io: tunnel.call(to).await?, proxied: false })
        })
    }
}

/// A connection that knows whether a proxy reads its requests: such a request names the whole URL.
pub(super) struct Stream {
    io: TokioIo<TcpStream>,
    proxied: bool,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        self.io.connected().proxy(self.proxied)
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use hyper::Request;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// What a proxy reads first for a request to this URL.
    async fn asked(url: &str) -> String {
        let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = format!("http://user:word@{}", proxy.local_addr().unwrap());
        let matcher = Matcher::builder().all(at).no("direct.test").build();
        let transport = Transport::new(None, Duration::from_secs(5), matcher).unwrap();
        let to: Uri = url.parse().unwrap();
        let mut request = Request::post(to.clone());
        if let Some(v) = transport.proxy_authorization(&to) {
            request = request.header(hyper::header::PROXY_AUTHORIZATION, v);
        }
        let sent = transport.pool.request(request.body(Full::default()).unwrap());
        let read = async {
            let (mut stream, _) = proxy.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let n = stream.read(&mut head).await.unwrap();
            let _ = stream.write_all(b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n").await;
            String::from_utf8(head[..n].to_vec()).unwrap().to_ascii_lowercase()
        };
        tokio::select! {
            head = read => head,
            // Not by the proxy: nobody has this name.
            _ = sent => String::new(),
        }
    }

    #[tokio::test]
    async fn a_proxy_gets_the_whole_url_or_a_tunnel_with_its_password() {
        let plain = asked("http://receiver.test/hook").await;
        assert!(plain.starts_with("post http://receiver.test/hook http/1.1\r\n"), "{plain}");
        let tunnel = asked("https://receiver.test/hook").await;
        assert!(tunnel.starts_with("connect receiver.test:443 http/1.1\r\n"), "{tunnel}");
        for head in [plain, tunnel] {
            // base64 of user:word, in lower case as all of it.
            assert!(head.contains("proxy-authorization: basic dxnlcjp3b3jk\r\n"), "{head}");
        }
        assert_eq!(asked("http://direct.test/hook").await, "");
    }
}
