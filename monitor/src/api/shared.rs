//! One answer for all clients that ask the same thing at the same time, so that a flood of requests costs the core no more
//! than a few.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

/// Answers by question. One is computed at a time, in the order of the questions.
///
/// An answer goes only to clients that asked before its computation began, so it knows of all that happened before each of
/// them asked.
#[derive(Debug)]
pub(super) struct SharedAnswers<K, V> {
    /// Questions whose answer is not begun yet.
    pending: Mutex<HashMap<K, watch::Receiver<Option<V>>>>,
    budget: tokio::sync::Mutex<Budget>,
}

impl<K, V> SharedAnswers<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// `share`: of one processor's time that computations may use in the long run.
    pub(super) fn new(share: f64) -> Arc<Self> {
        let budget = tokio::sync::Mutex::new(Budget { share, credit: CREDIT, at: Instant::now() });
        Arc::new(Self { pending: Mutex::default(), budget })
    }

    /// None: the computation was given up (the agent stops).
    pub(super) async fn get<F>(
        self: &Arc<Self>,
        key: K,
        compute: impl FnOnce() -> F + Send + 'static,
    ) -> Option<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut answer = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(a) = pending.get(&key) {
                a.clone()
            } else {
                let (tx, rx) = watch::channel(None);
                pending.insert(key.clone(), rx.clone());
                tokio::spawn(Arc::clone(self).run(key, tx, compute));
                rx
            }
        };
        answer.wait_for(Option::is_some).await.ok()?.clone()
    }

    /// In a task of its own: the client that asked first may leave before the others.
    async fn run<F: Future<Output = V>>(
        self: Arc<Self>,
        key: K,
        tx: watch::Sender<Option<V>>,
        compute: impl FnOnce() -> F,
    ) {
        let mut budget = self.budget.lock().await;
        budget.wait().await;
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        if tx.is_closed() {
            return;
        }
        let begun = Instant::now();
        let answer = compute().await;
        budget.credit -= begun.elapsed().as_secs_f64();
        drop(budget);
        tx.send_replace(Some(answer));
    }
}

/// Seconds that may be used at once after a quiet time.
const CREDIT: f64 = 0.5;

#[derive(Debug)]
struct Budget {
    share: f64,
    /// Seconds; below 0 the next computation waits.
    credit: f64,
    at: Instant,
}

impl Budget {
    async fn wait(&mut self) {
        self.refill();
        if self.credit < 0.0 {
            sleep(Duration::from_secs_f64(-self.credit / self.share)).await;
            self.refill();
        }
    }

    fn refill(&mut self) {
        let now = Instant::now();
        self.credit = (now - self.at).as_secs_f64().mul_add(self.share, self.credit).min(CREDIT);
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts the computations; each takes 20 ms.
    async fn ask(all: &Arc<SharedAnswers<u32, usize>>, key: u32, count: &Arc<AtomicUsize>) -> Option<usize> {
        let count = Arc::clone(count);
        let compute = move || async move {
            let begun = count.fetch_add(1, Ordering::SeqCst) + 1;
            sleep(Duration::from_millis(20)).await;
            begun
        };
        all.get(key, compute).await
    }

    #[tokio::test]
    async fn all_that_wait_share_one_answer_that_began_after_they_asked() {
        let (all, count) = (SharedAnswers::new(1.0), Arc::new(AtomicUsize::new(0)));
        let spawn = |key| {
            let (all, count) = (Arc::clone(&all), Arc::clone(&count));
            tokio::spawn(async move { ask(&all, key, &count).await })
        };
        let first = spawn(1);
        sleep(Duration::from_millis(5)).await;
        // The first one's computation has begun: these share the second one.
        let more: Vec<_> = (0..100).map(|_| spawn(1)).collect();
        let other = spawn(2);
        assert_eq!(first.await.unwrap(), Some(1));
        for m in more {
            assert_eq!(m.await.unwrap(), Some(2));
        }
        assert_eq!(other.await.unwrap(), Some(3));
        assert!(all.pending.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_client_that_leaves_takes_the_answer_from_nobody() {
        let (all, count) = (SharedAnswers::new(1.0), Arc::new(AtomicUsize::new(0)));
        let gone = tokio::time::timeout(Duration::from_millis(5), ask(&all, 1, &count)).await;
        assert!(gone.is_err());
        assert_eq!(ask(&all, 1, &count).await, Some(2));
        // One that nobody waits for any more when its turn comes is not computed.
        let (a, b) = tokio::join!(
            ask(&all, 1, &count),
            tokio::time::timeout(Duration::from_millis(5), ask(&all, 2, &count))
        );
        assert!(a == Some(3) && b.is_err());
        sleep(Duration::from_millis(50)).await;
        assert_eq!(count.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_flood_uses_its_share_and_no_more() {
        let (all, count) = (SharedAnswers::new(0.2), Arc::new(AtomicUsize::new(0)));
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(1_500) {
            ask(&all, 1, &count).await;
        }
        // What was saved up before, and the share of the time since; each computation takes 20 ms at least.
        let most = begun.elapsed().as_secs_f64().mul_add(0.2, CREDIT) + 0.02;
        let used = 0.02 * count.load(Ordering::SeqCst) as f64;
        assert!((0.2..=most).contains(&used), "{used} s of {most} s");
    }
}
