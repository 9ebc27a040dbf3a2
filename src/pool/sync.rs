//! Exports the atomics, the memory fence and the lock of the pool's state. Model checks use those of loom instead,
//! which explores the interleavings of threads.

#[cfg(not(keychoir_model))]
pub(super) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

#[cfg(keychoir_model)]
pub(super) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};
