//! A metric for each set of labels that was seen, found without a lock. The library's `Family` takes a lock that
//! all workers share, on every update; here a new set replaces a copy of the whole table, and all later requests
//! read that.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::hash::Hash;
use std::sync::Arc;

use arc_swap::ArcSwap;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;

/// The metrics `V` by their labels `K`.
#[derive(Debug)]
pub(super) struct MetricTable<K, V>(Arc<MetricMap<K, V>>);

#[derive(Debug)]
struct MetricMap<K, V> {
    metrics: ArcSwap<HashMap<K, V>>,
    max: usize,
    other: K,
}

impl<K: Clone + Eq + Hash, V: Clone + Default> MetricTable<K, V> {
    /// An empty table. From `max` sets of labels on, all others are counted under `other`.
    pub(super) fn new(max: usize, other: K) -> Self {
        Self(Arc::new(MetricMap { metrics: ArcSwap::default(), max, other }))
    }

    /// Updates the metric with the labels `key`; a metric that is new gets the labels `new_key`.
    pub(super) fn update<Q>(&self, key: &Q, new_key: impl FnOnce() -> K, update: impl FnOnce(&V))
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let MetricMap { metrics, max, other } = &*self.0;
        let known = metrics.load();
        if let Some(metric) = known.get(key) {
            return update(metric);
        }
        let key = new_key();
        let other_if_full = || known.get::<K>(other).filter(|_| known.len() > *max);
        if let Some(metric) = known.get::<K>(&key).or_else(other_if_full) {
            return update(metric);
        }
        drop(known);
        metrics.rcu(|known| {
            let mut more = HashMap::clone(known);
            let key = if more.len() < *max { &key } else { other };
            more.entry(key.clone()).or_default();
            more
        });
        let known = metrics.load();
        if let Some(metric) = known.get::<K>(&key).or_else(|| known.get::<K>(other)) {
            update(metric);
        }
    }

    /// A family of these metrics; `encode` writes the samples of one of them.
    pub(super) fn family(&self, kind: MetricType, encode: Encode<K, V>) -> MetricFamily<K, V> {
        MetricFamily { table: Self(Arc::clone(&self.0)), kind, encode }
    }
}

type Encode<K, V> = fn(&K, &V, &mut MetricEncoder<'_>) -> fmt::Result;

/// A family of metrics, for the registry.
#[derive(Debug)]
pub(super) struct MetricFamily<K, V> {
    table: MetricTable<K, V>,
    kind: MetricType,
    encode: Encode<K, V>,
}

impl<K, V> EncodeMetric for MetricFamily<K, V> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        self.table
            .0
            .metrics
            .load()
            .iter()
            .try_for_each(|(key, metric)| (self.encode)(key, metric, &mut encoder))
    }

    fn metric_type(&self) -> MetricType {
        self.kind
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use prometheus_client::metrics::counter::Counter;

    use super::*;

    fn count(metrics: &MetricTable<u32, Counter>, key: u32) {
        metrics.update(&key, || key, |metric| _ = metric.inc());
    }

    fn counts(metrics: &MetricTable<u32, Counter>) -> Vec<(u32, u64)> {
        let mut counts: Vec<_> =
            metrics.0.metrics.load().iter().map(|(key, metric)| (*key, metric.get())).collect();
        counts.sort_unstable();
        counts
    }

    #[test]
    fn a_full_table_counts_new_labels_as_other_and_known_ones_as_before() {
        let metrics = MetricTable::new(2, 0);
        [1, 2, 3, 4, 1].into_iter().for_each(|key| count(&metrics, key));
        assert_eq!(counts(&metrics), [(0, 2), (1, 2), (2, 1)]);
    }

    #[test]
    fn nothing_is_lost_when_several_threads_meet_the_same_new_labels() {
        let metrics = MetricTable::new(50, 0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (1..=100).for_each(|key| count(&metrics, key)));
            }
        });
        let counts = counts(&metrics);
        assert_eq!((counts.len(), counts.iter().map(|(_, count)| count).sum::<u64>()), (51, 400));
    }
}
