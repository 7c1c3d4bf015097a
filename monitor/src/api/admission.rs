//! How many connections, requests and open answers each client may have, and which connection is closed to make room.
//!
//! A client is an [`Owner`]: a uid on this host, or an address. At a bound the connection that has been idle longest is
//! closed first; a connection with a request under way is never closed for another one. Root has a reserve of its own.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::limit::Rate;
use crate::model::stats::StoreNumbers;

/// The client that a connection is counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// uid 0; on the control socket only in the agent's own pid namespace.
    Root,
    Uid(u32),
    /// A TCP client whose uid is unknown, because it runs on another host.
    Address(IpAddr),
}

/// The bounds of one listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Connections at a time.
    pub connections: usize,
    /// Of these, connections that only root may use.
    pub reserve: usize,
    /// Connections of one owner at a time, root excepted.
    pub per_owner: usize,
    /// Requests of one owner: at once, and per second in the long run.
    pub rate: (f64, f64),
    /// The same for root.
    pub root_rate: (f64, f64),
}

impl Bounds {
    /// At most a quarter of the descriptors that this process may open, so that clients cannot take those of the agent.
    pub(super) fn within(self, descriptors: usize) -> Self {
        let connections = self.connections.min(descriptors / 4).max(4);
        let reserve = (self.reserve * connections / self.connections).max(1);
        Self { connections, reserve, per_owner: self.per_owner.min(connections - reserve), ..self }
    }
}

/// Event streams of one owner at a time, root excepted.
const STREAMS_PER_OWNER: usize = 8;
/// Event streams that only root may open, of [`super::feed::READERS`].
const STREAMS_RESERVE: usize = 8;
/// Answers of one owner that are in memory at a time, since the client has not read them yet.
const OPEN_ANSWERS: usize = 4;
/// Owners whose rate is remembered after their last connection.
const ACCOUNTS: usize = 1024;

/// What one owner has used of its share.
#[derive(Debug)]
pub(super) struct Account {
    pub owner: Owner,
    pub rate: Rate,
    /// One permit for each large answer that is not read to its end.
    pub answers: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    all_streams: Arc<Semaphore>,
}

/// Held as long as an event stream is open.
#[derive(Debug)]
pub(super) struct StreamPermit {
    _of_owner: OwnedSemaphorePermit,
    _of_all: Option<OwnedSemaphorePermit>,
}

impl Account {
    /// None: the owner, or all owners but root together, have their number of event streams open.
    pub(super) fn open_stream(&self) -> Option<StreamPermit> {
        let of_owner = Arc::clone(&self.streams).try_acquire_owned().ok()?;
        let of_all = match self.owner {
            Owner::Root => None,
            _ => Some(Arc::clone(&self.all_streams).try_acquire_owned().ok()?),
        };
        Some(StreamPermit { _of_owner: of_owner, _of_all: of_all })
    }
}

#[derive(Debug)]
struct Open {
    owner: Owner,
    /// None while a request is under way.
    idle_since: Option<Instant>,
    evict: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    open: BTreeMap<u64, Open>,
    accounts: HashMap<Owner, Arc<Account>>,
    /// Connections that were closed for another one, or found no place.
    evictions: u64,
}

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct Pool {
    bounds: Bounds,
    streams: Arc<Semaphore>,
    state: Mutex<State>,
}

impl Pool {
    pub(super) fn new(bounds: Bounds) -> Arc<Self> {
        let streams = Arc::new(Semaphore::new(super::feed::READERS - STREAMS_RESERVE));
        Arc::new(Self { bounds, streams, state: Mutex::default() })
    }

    /// Makes room by closing an idle connection where a bound is reached. None: no connection can be closed.
    pub(super) fn admit(self: &Arc<Self>, owner: Owner) -> Option<Connection> {
        let mut state = self.lock();
        if !self.make_room(&mut state, owner) {
            state.evictions += 1;
            return None;
        }
        let account = self.account(&mut state, owner);
        let (id, evict) = (state.next, Arc::new(Notify::new()));
        state.next += 1;
        state.open.insert(id, Open { owner, idle_since: Some(Instant::now()), evict: Arc::clone(&evict) });
        drop(state);
        Some(Connection { slot: Arc::new(Slot { pool: Arc::clone(self), id }), account, evict })
    }

    fn make_room(&self, state: &mut State, owner: Owner) -> bool {
        let root = owner == Owner::Root;
        if !root {
            let own = state.open.values().filter(|o| o.owner == owner).count();
            if own >= self.bounds.per_owner && !state.evict(|o| o.owner == owner) {
                return false;
            }
            let readers = state.open.values().filter(|o| o.owner != Owner::Root).count();
            let most = self.bounds.connections - self.bounds.reserve;
            if readers >= most && !state.evict(|o| o.owner != Owner::Root) {
                return false;
            }
        }
        state.open.len() < self.bounds.connections
            || state.evict(|o| o.owner != Owner::Root)
            || (root && state.evict(|_| true))
    }

    /// Closes the connection that has been idle longest. False: none is idle.
    pub(super) fn evict_one(&self) -> bool {
        self.lock().evict(|_| true)
    }

    pub(super) fn numbers(&self, store: &'static str) -> StoreNumbers {
        let state = self.lock();
        StoreNumbers {
            store,
            entries: state.open.len() as u64,
            max: self.bounds.connections as u64,
            evictions: state.evictions,
        }
    }

    pub(super) const fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    fn account(&self, state: &mut State, owner: Owner) -> Arc<Account> {
        if let Some(a) = state.accounts.get(&owner) {
            return Arc::clone(a);
        }
        if state.accounts.len() >= ACCOUNTS {
            // Others have a connection, or their rate is used up: a new connection must not bring a new rate.
            state.accounts.retain(|_, a| Arc::strong_count(a) > 1 || !a.rate.is_full());
            if state.accounts.len() >= 2 * ACCOUNTS {
                state.accounts.retain(|_, a| Arc::strong_count(a) > 1);
            }
        }
        let root = owner == Owner::Root;
        let (burst, per_second) = if root { self.bounds.root_rate } else { self.bounds.rate };
        let streams = if root { super::feed::READERS } else { STREAMS_PER_OWNER };
        let account = Arc::new(Account {
            owner,
            rate: Rate::new(burst, per_second),
            answers: Arc::new(Semaphore::new(OPEN_ANSWERS)),
            streams: Arc::new(Semaphore::new(streams)),
            all_streams: Arc::clone(&self.streams),
        });
        state.accounts.insert(owner, Arc::clone(&account));
        account
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Its task closes the socket as soon as it runs; the place is free at once.
    fn evict(&mut self, of: impl Fn(&Open) -> bool) -> bool {
        let idle = self.open.iter().filter(|(_, o)| of(o)).filter_map(|(&id, o)| Some((o.idle_since?, id)));
        let Some((_, id)) = idle.min() else { return false };
        if let Some(o) = self.open.remove(&id) {
            o.evict.notify_one();
        }
        self.evictions += 1;
        true
    }
}

#[derive(Debug)]
struct Slot {
    pool: Arc<Pool>,
    id: u64,
}

impl Slot {
    fn set_idle(&self, since: Option<Instant>) {
        // One that is evicted has no entry any more.
        if let Some(o) = self.pool.lock().open.get_mut(&self.id) {
            o.idle_since = since;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.lock().open.remove(&self.id);
    }
}

/// An admitted connection. Its place is free when this and every [`Busy`] of it are dropped.
#[derive(Debug)]
pub(super) struct Connection {
    slot: Arc<Slot>,
    pub account: Arc<Account>,
    evict: Arc<Notify>,
}

impl Connection {
    /// Ends when the connection shall be closed to make room.
    pub(super) fn evicted(&self) -> impl Future<Output = ()> + use<> {
        let evict = Arc::clone(&self.evict);
        async move { evict.notified().await }
    }

    /// A request is under way until the guard is dropped.
    pub(super) fn begin(&self) -> Busy {
        self.slot.set_idle(None);
        Busy(Arc::clone(&self.slot))
    }
}

#[derive(Debug)]
pub(super) struct Busy(Arc<Slot>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set_idle(Some(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Arc<Pool> {
        Pool::new(Bounds {
            connections: 8,
            reserve: 2,
            per_owner: 3,
            rate: (1.0, 0.0),
            root_rate: (9.0, 9.0),
        })
    }

    async fn closed(c: &Connection) -> bool {
        tokio::time::timeout(std::time::Duration::ZERO, c.evicted()).await.is_ok()
    }

    #[tokio::test]
    async fn the_longest_idle_connection_of_the_same_owner_is_closed_first() {
        let p = pool();
        let [a, b, c] = [1, 1, 1].map(|u| p.admit(Owner::Uid(u)).unwrap());
        let other = p.admit(Owner::Uid(2)).unwrap();
        // The oldest has a request under way, the next was used after the last.
        let busy = a.begin();
        drop(b.begin());
        let d = p.admit(Owner::Uid(1)).unwrap();
        assert!(closed(&c).await && !closed(&a).await && !closed(&b).await && !closed(&other).await);
        drop(busy);
        let _more: Vec<_> = (0..2).map(|_| p.admit(Owner::Uid(1)).unwrap()).collect();
        assert!(closed(&b).await && closed(&d).await && !closed(&a).await && !closed(&other).await);
        let n = p.numbers("x");
        assert_eq!((n.entries, n.max, n.evictions), (4, 8, 3));
    }

    #[tokio::test]
    async fn a_busy_connection_is_never_closed_and_root_keeps_its_reserve() {
        let p = pool();
        let held: Vec<_> = (0..6).map(|u| p.admit(Owner::Uid(u % 2)).unwrap()).collect();
        let busy: Vec<_> = held.iter().map(Connection::begin).collect();
        assert!(p.admit(Owner::Uid(0)).is_none() && p.admit(Owner::Uid(9)).is_none());
        let root = [p.admit(Owner::Root).unwrap(), p.admit(Owner::Root).unwrap()];
        drop(busy);
        // A third of root takes the place of a reader, a reader never that of root.
        let _third = p.admit(Owner::Root).unwrap();
        assert!(closed(&held[0]).await);
        let _busy: Vec<_> = held[1..].iter().map(Connection::begin).collect();
        assert!(p.admit(Owner::Uid(9)).is_none());
        assert!(!closed(&root[0]).await && !closed(&root[1]).await);
    }

    #[tokio::test]
    async fn an_owner_keeps_its_rate_over_its_connections_and_owners_are_bounded() {
        let p = pool();
        assert!(p.admit(Owner::Uid(1)).unwrap().account.rate.take(1.0));
        assert!(!p.admit(Owner::Uid(1)).unwrap().account.rate.take(1.0));
        for u in 2..4 * ACCOUNTS as u32 {
            let taken = p.admit(Owner::Uid(u)).unwrap().account.rate.take(1.0);
            assert!(taken);
        }
        assert!(p.lock().accounts.len() <= 2 * ACCOUNTS);
    }

    #[tokio::test]
    async fn event_streams_are_bounded_for_each_owner_and_root_has_a_reserve() {
        let p = pool();
        let of = |owner| p.admit(owner).unwrap();
        let readers: Vec<_> = (1..5).map(|u| of(Owner::Uid(u))).collect();
        let mut streams: Vec<_> =
            readers.iter().flat_map(|c| std::iter::from_fn(|| c.account.open_stream())).collect();
        assert_eq!(streams.len(), super::super::feed::READERS - STREAMS_RESERVE);
        let root = of(Owner::Root);
        assert!(root.account.open_stream().is_some());
        streams.truncate(STREAMS_PER_OWNER);
        assert!(readers[0].account.open_stream().is_none() && readers[3].account.open_stream().is_some());
    }

    #[test]
    fn few_descriptors_leave_room_for_the_agent() {
        let b = Bounds { connections: 384, reserve: 256, ..*pool().bounds() }.within(64);
        assert_eq!((b.connections, b.reserve), (16, 10));
        assert!(b.per_owner <= 6);
        let least = Bounds { per_owner: 16, ..b }.within(4);
        assert!(least.connections > least.reserve && least.per_owner > 0);
    }
}
