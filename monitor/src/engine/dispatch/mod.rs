//! Passes what follows from one part of the engine on to the others. No decision is made here.

mod forest_changes;
mod jobs;
mod start;
mod time;
