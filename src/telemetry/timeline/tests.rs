//! Tests of the timeline with a clock that advances, jumps or is set back: no request is lost or counted twice,
//! intervals are consecutive and end after 24 hours, and the memory is limited.

use http::Method;
use proptest::prelude::*;

use super::super::metrics::RequestLabels;
use super::*;

/// 2026-11-30T00:00:00Z, the start of an interval.
const NOW: UnixMs = UnixMs(1_795_996_800_000);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

/// Returns totals with `requests` requests.
fn totals(requests: u64) -> RequestTotals {
    let mut totals =
        RequestTotals { requests, failed: requests / 2, retries: requests / 3, ..RequestTotals::default() };
    totals.first_byte[1] = requests;
    totals
}

/// Returns the intervals with requests: the minutes of their start from `NOW`, and the number of requests.
fn busy_intervals(timeline: &Timeline, now: UnixMs) -> Vec<(i64, u64)> {
    let intervals = timeline.intervals(now);
    let minutes = |start: UnixMs| (i64::try_from(start.0).unwrap() - i64::try_from(NOW.0).unwrap()) / 60_000;
    let busy = intervals.iter().filter(|interval| interval.requests > 0);
    busy.map(|interval| (minutes(interval.start), interval.requests)).collect()
}

#[test]
fn requests_are_in_the_interval_in_which_they_were_recorded() {
    let mut timeline = Timeline::default();
    assert_eq!(timeline.intervals(NOW).len(), 1, "the current interval must be listed");
    for (minutes, requests) in [(0, 2), (4, 5), (5, 6), (17, 10), (19, 10)] {
        timeline.record(NOW.plus(MINUTE * minutes), &totals(requests));
    }
    let now = NOW.plus(MINUTE * 21);
    assert_eq!(busy_intervals(&timeline, now), [(0, 5), (5, 1), (15, 4)]);
    let intervals = timeline.intervals(now);
    let starts: Vec<u64> =
        intervals.iter().map(|interval| interval.start.since(NOW).as_secs() / 60).collect();
    assert_eq!(starts, [0, 5, 10, 15, 20], "intervals without requests must be listed too");
    assert_eq!((intervals[0].failed, intervals[0].retries), (2, 1));
    let first_byte = intervals[0].first_byte.unwrap();
    assert_eq!(
        first_byte.p50,
        Duration::from_secs_f64(0.0175),
        "the median must be in the middle of the bucket"
    );
    assert!(first_byte.p95 > first_byte.p50 && intervals[2].first_byte.is_none());
}

#[test]
fn an_interval_is_removed_after_24_hours() {
    let mut timeline = Timeline::default();
    timeline.record(NOW, &totals(1));
    timeline.record(NOW.plus(MINUTE * 5), &totals(3));
    let time_before = NOW.plus(HOUR * 24).minus(Duration::from_millis(1));
    assert_eq!(busy_intervals(&timeline, time_before), [(0, 1), (5, 2)]);
    timeline.record(time_before, &totals(3));
    assert_eq!(timeline.intervals(time_before).len(), 288);
    let time_after = NOW.plus(HOUR * 24);
    assert_eq!(
        busy_intervals(&timeline, time_after),
        [(5, 2)],
        "an old interval must not be listed, even before the next record"
    );
    timeline.record(time_after, &totals(3));
    assert_eq!((timeline.intervals.len(), timeline.intervals(time_after).len()), (1, 288));
}

#[test]
fn a_clock_that_was_set_back_loses_no_request() {
    let mut timeline = Timeline::default();
    timeline.record(NOW, &totals(1));
    timeline.record(NOW.plus(HOUR), &totals(3));
    let now = NOW.plus(MINUTE * 30);
    timeline.record(now, &totals(4));
    assert_eq!(busy_intervals(&timeline, now), [(0, 1), (30, 3)]);
    assert_eq!(timeline.recent(now, &totals(4), MINUTE * 30).requests, 3);
    let now = NOW.minus(MINUTE);
    timeline.record(now, &totals(4));
    assert_eq!(busy_intervals(&timeline, now), [(-5, 4)]);
    assert_eq!(timeline.intervals(now).len(), 1);
}

#[test]
fn a_gap_has_no_requests_and_is_not_recent() {
    let mut timeline = Timeline::default();
    timeline.record(NOW, &totals(1));
    let resumed = NOW.plus(HOUR * 3);
    timeline.record(resumed, &totals(2));
    assert_eq!(busy_intervals(&timeline, resumed), [(0, 1), (180, 1)]);
    let recent = timeline.recent(resumed.plus(MINUTE), &totals(5), MINUTE * 5);
    assert_eq!((recent.covered, recent.requests), (MINUTE, 3));
    // A clock that started in 1970 is set.
    let mut timeline = Timeline::default();
    timeline.record(UnixMs(0), &totals(1));
    timeline.record(NOW, &totals(2));
    assert_eq!((timeline.intervals(NOW).len(), busy_intervals(&timeline, NOW)), (288, vec![(0, 1)]));
}

#[test]
fn totals_of_a_late_caller_are_not_counted_twice() {
    let mut timeline = Timeline::default();
    timeline.record(NOW, &totals(9));
    timeline.record(NOW, &totals(6));
    timeline.record(NOW, &totals(12));
    assert_eq!(busy_intervals(&timeline, NOW), [(0, 12)]);
}

#[test]
fn recent_requests_are_counted_from_the_sample_before_them() {
    let mut timeline = Timeline::default();
    for sample in 0..=60_u32 {
        // One request per second.
        timeline.record(NOW.plus(SAMPLE_PERIOD * sample), &totals(u64::from(sample) * 10));
    }
    let now = NOW.plus(MINUTE * 10 + Duration::from_secs(4));
    let current = totals(604);
    let recent = timeline.recent(now, &current, MINUTE * 5);
    assert_eq!((recent.covered, recent.requests), (Duration::from_secs(304), 304));
    assert_eq!(recent.requests_per_minute().round(), 60.0);
    assert_eq!(recent.failed_share(), Some(152.0 / 304.0));
    assert!(recent.first_byte.is_some());
    let all = timeline.recent(now, &current, HOUR * 24);
    assert_eq!((all.covered, all.requests), (MINUTE * 10 + Duration::from_secs(4), 604));
    let none = Timeline::default().recent(now, &current, MINUTE);
    assert_eq!((none.covered, none.requests, none.failed_share()), (Duration::ZERO, 0, None));
    assert_eq!((none.requests_per_minute(), none.first_byte), (0.0, None));
}

#[test]
fn frequent_reads_add_no_samples() {
    let mut timeline = Timeline::default();
    for ms in 0..20_000 {
        timeline.record(NOW.plus(Duration::from_millis(ms)), &totals(ms));
    }
    assert_eq!(timeline.samples.len(), 2);
}

proptest! {
    #[test]
    fn the_intervals_add_up_to_the_totals(
        // Milliseconds that the clock advances or is set back, and requests that ended.
        steps in prop::collection::vec((-7_200_000_i64..1_200_000, 0_u64..50), 1..60),
    ) {
        let mut timeline = Timeline::default();
        let (mut now, mut expected) = (NOW, RequestTotals::default());
        for (advance, requests) in steps {
            now = UnixMs(now.0.saturating_add_signed(advance));
            expected = expected.plus(&totals(requests));
            timeline.record(now, &expected);
            let intervals = timeline.intervals(now);
            let sum = |read: fn(&TimelineInterval) -> u64| intervals.iter().map(read).sum::<u64>();
            prop_assert_eq!(sum(|interval| interval.requests), expected.requests);
            prop_assert_eq!(sum(|interval| interval.failed), expected.failed);
            prop_assert_eq!(sum(|interval| interval.retries), expected.retries);
            let stored = timeline.intervals.iter().fold(RequestTotals::default(), |sum, (_, counts)| sum.plus(counts));
            prop_assert_eq!(stored, expected);
        }
    }

    #[test]
    fn the_memory_is_bounded_and_the_intervals_are_consecutive(
        steps in prop::collection::vec((-100_000_000_i64..100_000_000, 1_u64..50), 1..8),
    ) {
        let mut timeline = Timeline::default();
        let (mut now, mut requests) = (NOW, 0);
        for (advance, added) in steps {
            now = UnixMs(now.0.saturating_add_signed(advance));
            requests += added;
            // A busy phase after each jump.
            for sample in 0..400 {
                timeline.record(now.plus(SAMPLE_PERIOD * sample), &totals(requests));
            }
            now = now.plus(SAMPLE_PERIOD * 400);
            prop_assert!(timeline.intervals.len() <= 288 && timeline.samples.len() <= MAX_SAMPLES);
            let intervals = timeline.intervals(now);
            prop_assert!((1..=288).contains(&intervals.len()));
            for pair in intervals.windows(2) {
                prop_assert_eq!(pair[1].start, pair[0].start.plus(TIMELINE_INTERVAL));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_task_records_periodically_and_a_read_includes_the_latest_requests() {
    let metrics = RequestMetrics::default();
    let timeline = TimelineHandle::new(metrics.clone());
    let labels = RequestLabels { method: Method::GET, route: None, code: Some(503), client: None };
    let end_request = || metrics.record_request_end(&labels, Duration::ZERO);
    end_request();
    let test = async {
        let task = sample_timeline(timeline.clone());
        let _ = tokio::time::timeout(MINUTE * 5 + SAMPLE_PERIOD * 2 - Duration::from_secs(1), task).await;
        assert_eq!(timeline.timeline.lock().unwrap().samples.len(), 32);
        end_request();
        let now = clock::now();
        let counts = timeline.intervals(now).into_iter().map(|interval| (interval.requests, interval.failed));
        assert_eq!(counts.collect::<Vec<_>>(), [(1, 1), (1, 1)]);
        let recent = timeline.recent(now, MINUTE);
        assert_eq!((recent.covered, recent.requests), (MINUTE + Duration::from_secs(9), 1));
    };
    clock::SIMULATED_CLOCK.scope((clock::instant(), NOW), test).await;
}
