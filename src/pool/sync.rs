//! Exports the atomics and the lock of the pool's state. Model checks use the atomics and the lock of loom instead,
//! which explores every interleaving of threads.

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
