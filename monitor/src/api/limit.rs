//! Bounds for clients: how often, and how long one may keep the server waiting for it to read.

use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A token bucket: `burst` at once, `per_second` in the long run.
#[derive(Debug)]
pub(super) struct Rate {
    burst: f64,
    per_second: f64,
    state: Mutex<(f64, Instant)>,
}

impl Rate {
    pub(super) fn new(burst: f64, per_second: f64) -> Self {
        Self { burst, per_second, state: Mutex::new((burst, Instant::now())) }
    }

    /// Whether one more is allowed now.
    pub(super) fn take(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let tokens = (now - state.1).as_secs_f64().mul_add(self.per_second, state.0).min(self.burst);
        let ok = tokens >= 1.0;
        *state = (if ok { tokens - 1.0 } else { tokens }, now);
        ok
    }
}

/// A stream whose writes fail when the other end has taken nothing for `patience`.
#[derive(Debug)]
pub(super) struct TimeoutStream<S> {
    io: S,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> TimeoutStream<S> {
    pub(super) const fn new(io: S, patience: Duration) -> Self {
        Self { io, patience, stalled: None }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.stalled = None;
            return done;
        }
        let patience = self.patience;
        ready!(self.stalled.get_or_insert_with(|| Box::pin(sleep(patience))).as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimeoutStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimeoutStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.io).poll_write(cx, buf);
        self.watch(cx, done)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.io).poll_flush(cx);
        self.watch(cx, done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn a_bucket_gives_its_burst_and_refills() {
        let rate = Rate::new(3.0, 1000.0);
        assert_eq!((0..3).filter(|_| rate.take()).count(), 3);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(rate.take());
        let dry = Rate::new(1.0, 0.0);
        assert!(dry.take() && !dry.take());
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_given_up() {
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let mut io = TimeoutStream::new(ours, Duration::from_millis(50));
        let e = io.write_all(&vec![0; 8 << 20]).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
    }
}
