//! Finds the metrics of a label set in a table that is read without a lock. A new label set replaces the table by a
//! larger copy. `Family` of `prometheus_client` would acquire a lock, shared by all workers, on every update.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::hash::Hash;
use std::sync::Arc;

use arc_swap::ArcSwap;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;

/// A table of metrics of type `V` by their labels of type `K`.
#[derive(Debug)]
pub(super) struct MetricTable<K, V>(Arc<MetricMap<K, V>>);

#[derive(Debug)]
struct MetricMap<K, V> {
    metrics: ArcSwap<HashMap<K, V>>,
    /// Maximum number of label sets, without `other`.
    max_entries: usize,
    /// The labels of the metric that counts for all label sets above the maximum.
    other: K,
}

impl<K: Clone + Eq + Hash, V: Clone + Default> MetricTable<K, V> {
    /// Creates an empty table of at most `max_entries` label sets, plus `other`, which counts for all further
    /// label sets.
    pub(super) fn new(max_entries: usize, other: K) -> Self {
        Self(Arc::new(MetricMap { metrics: ArcSwap::default(), max_entries, other }))
    }

    /// Updates the metric of `key`. If it does not exist, it is created with the labels from `new_key`.
    pub(super) fn update<Q>(&self, key: &Q, new_key: impl FnOnce() -> K, update: impl FnOnce(&V))
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let MetricMap { metrics, max_entries, other } = &*self.0;
        let current = metrics.load();
        if let Some(metric) = current.get(key) {
            return update(metric);
        }
        let key = new_key();
        let other_if_full = || current.get::<K>(other).filter(|_| current.len() > *max_entries);
        if let Some(metric) = current.get::<K>(&key).or_else(other_if_full) {
            return update(metric);
        }
        drop(current);
        metrics.rcu(|current| {
            let mut extended_map = HashMap::clone(current);
            let key = if extended_map.len() < *max_entries { &key } else { other };
            extended_map.entry(key.clone()).or_default();
            extended_map
        });
        let current = metrics.load();
        if let Some(metric) = current.get::<K>(&key).or_else(|| current.get::<K>(other)) {
            update(metric);
        }
    }

    /// Passes every label set and its metric to `read`.
    pub(super) fn for_each(&self, mut read: impl FnMut(&K, &V)) {
        self.0.metrics.load().iter().for_each(|(key, metric)| read(key, metric));
    }

    /// Returns a family for the registry. `encode` writes the samples of one metric.
    pub(super) fn family(&self, metric_type: MetricType, encode: EncodeSamples<K, V>) -> MetricFamily<K, V> {
        MetricFamily { map: Arc::clone(&self.0), metric_type, encode }
    }
}

/// Writes the samples of one metric.
type EncodeSamples<K, V> = fn(&K, &V, &mut MetricEncoder<'_>) -> fmt::Result;

/// The metrics of a table as a family of a registry.
#[derive(Debug)]
pub(super) struct MetricFamily<K, V> {
    map: Arc<MetricMap<K, V>>,
    metric_type: MetricType,
    encode: EncodeSamples<K, V>,
}

impl<K, V> EncodeMetric for MetricFamily<K, V> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let metrics = self.map.metrics.load();
        metrics.iter().try_for_each(|(key, metric)| (self.encode)(key, metric, &mut encoder))
    }

    fn metric_type(&self) -> MetricType {
        self.metric_type
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use prometheus_client::metrics::counter::Counter;

    use super::*;

    fn increment(metrics: &MetricTable<u32, Counter>, key: u32) {
        metrics.update(&key, || key, |metric| _ = metric.inc());
    }

    fn counts(metrics: &MetricTable<u32, Counter>) -> Vec<(u32, u64)> {
        let mut counts = Vec::new();
        metrics.for_each(|key, metric| counts.push((*key, metric.get())));
        counts.sort_unstable();
        counts
    }

    #[test]
    fn a_full_table_counts_new_labels_as_other_and_known_labels_separately() {
        let metrics = MetricTable::new(2, 0);
        [1, 2, 3, 4, 1].into_iter().for_each(|key| increment(&metrics, key));
        assert_eq!(counts(&metrics), [(0, 2), (1, 2), (2, 1)]);
    }

    #[test]
    fn no_count_is_lost_when_threads_add_the_same_labels() {
        let metrics = MetricTable::new(50, 0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (1..=100).for_each(|key| increment(&metrics, key)));
            }
        });
        let counts = counts(&metrics);
        assert_eq!((counts.len(), counts.iter().map(|(_, count)| count).sum::<u64>()), (51, 400));
    }
}
