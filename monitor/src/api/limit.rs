//! Bounds in time for clients: how often one may ask, and how long it may take to read its answer.

use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

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

    /// Whether a request of this cost is allowed now.
    pub(super) fn take(&self, cost: f64) -> bool {
        self.update(|tokens| (tokens >= cost).then_some(tokens - cost))
    }

    /// Takes the cost in any case: requests that follow wait for it.
    pub(super) fn charge(&self, cost: f64) {
        self.update(|tokens| Some(tokens - cost));
    }

    /// Nothing was taken for so long that this equals a new one.
    pub(super) fn is_full(&self) -> bool {
        self.update(|tokens| (tokens >= self.burst).then_some(tokens))
    }

    fn update(&self, to: impl FnOnce(f64) -> Option<f64>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let tokens = (now - state.1).as_secs_f64().mul_add(self.per_second, state.0).min(self.burst);
        let left = to(tokens);
        *state = (left.unwrap_or(tokens), now);
        left.is_some()
    }
}

/// A stream whose writes fail when the other end has read nothing for `stalled`, or has not read all that was written
/// within `total`.
#[derive(Debug)]
pub(super) struct TimeoutStream<S> {
    io: S,
    stalled: Duration,
    total: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// Since when there is something to write.
    writing: Option<Instant>,
}

impl<S> TimeoutStream<S> {
    pub(super) const fn new(io: S, stalled: Duration, total: Duration) -> Self {
        Self { io, stalled, total, timer: None, writing: None }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let now = Instant::now();
        let until = *self.writing.get_or_insert(now) + self.total;
        if now < until {
            if done.is_ready() {
                self.timer = None;
                return done;
            }
            let until = until.min(now + self.stalled);
            ready!(self.timer.get_or_insert_with(|| Box::pin(sleep_until(until))).as_mut().poll(cx));
        }
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

    /// The caller has written all that it had: what follows has its own time.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.io).poll_flush(cx);
        let done = self.watch(cx, done);
        if done.is_ready() {
            self.writing = None;
        }
        done
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn a_bucket_gives_its_burst_and_refills() {
        let rate = Rate::new(3.0, 1000.0);
        assert!(rate.is_full());
        assert_eq!((0..3).filter(|_| rate.take(1.0)).count(), 3);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(rate.take(1.0));
        let dry = Rate::new(1.0, 0.0);
        assert!(dry.take(1.0) && !dry.take(1.0) && !dry.is_full());
        let charged = Rate::new(1.0, 50.0);
        charged.charge(3.0);
        assert!(!charged.take(0.5));
        tokio::time::sleep(Duration::from_millis(80)).await;
        assert!(charged.take(1.0));
    }

    #[tokio::test]
    async fn a_reader_that_reads_nothing_is_given_up() {
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let mut io = TimeoutStream::new(ours, Duration::from_millis(50), Duration::from_mins(1));
        let e = io.write_all(&vec![0; 8 << 20]).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_reader_that_reads_slowly_is_given_up_after_the_whole_time() {
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let slow = tokio::spawn(async move {
            let mut buf = vec![0; 1 << 16];
            while theirs.read(&mut buf).await.is_ok_and(|n| n > 0) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let (stalled, total) = (Duration::from_mins(1), Duration::from_millis(200));
        let mut io = TimeoutStream::new(ours, stalled, total);
        let begun = Instant::now();
        let e = io.write_all(&vec![0; 64 << 20]).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        drop(io);
        slow.await.unwrap();
    }
}
