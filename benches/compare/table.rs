//! Prints the results of a comparison as a table.

use crate::harness::{format_median_and_range, median};
use crate::peers::Peer;
use crate::rounds::{Entry, Measured, Plan, Turn};
use crate::workload::{PACED_BYTES, PACED_MS, Workload};

/// The reference of the rows.
pub struct Reference {
    pub name: &'static str,
    /// The index of its row.
    pub index: Option<usize>,
    /// The maximum ratio for builds of Keychoir.
    pub bound: Option<f64>,
}

/// The heading: workload, rate and connections.
pub fn describe(plan: &Plan, workload: Workload) -> String {
    let (rate, connections) = (workload.rate(), workload.connections());
    let what = match workload {
        Workload::Paced => format!(
            "{rate} streams at once, {PACED_BYTES} B every {PACED_MS} ms; of each piece and not of a request"
        ),
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            format!("{rate} requests/s over {connections} connections")
        }
    };
    format!("{}: {what}; {} rounds of {} s in turns", workload.name(), plan.rounds, plan.seconds)
}

pub fn print(title: &str, entries: &[Entry], measured: &[Measured], reference: &Reference) {
    let others = measured.iter().flat_map(|measured| &measured.turns).map(|turn| turn.others);
    println!("\n{title}; others had {:.0}% of this machine", median(others) * 100.0);
    println!(
        "{:<18}{:>24}{:>22}{:>9}{:>9}{:>9}{:>10}{:>8}{:>7}{:>6}{:>7}",
        "",
        "processor, µs",
        format!("beside {}", reference.name),
        "p50 +µs",
        "p99 +µs",
        "first +",
        "most/s",
        "its µs",
        "ratio",
        "busy",
        "MiB"
    );
    let direct = entries.iter().position(|entry| entry.peer == Peer::Direct);
    let direct = direct.map(|index| &*measured[index].turns);
    for (index, (entry, measured_here)) in entries.iter().zip(measured).enumerate() {
        let reference_turns = reference.index.map(|index| &*measured[index].turns);
        let ratios: Vec<f64> = match reference_turns {
            Some(turns) if entry.peer != Peer::Direct && reference.index != Some(index) => {
                measured_here.turns.iter().zip(turns).map(|(own, other)| own.cost / other.cost).collect()
            }
            _ => Vec::new(),
        };
        let most_ratio = reference_turns.filter(|_| !ratios.is_empty()).and_then(|turns| {
            let pairs = measured_here.turns.iter().zip(turns);
            let ratios =
                pairs.filter_map(|(own, other)| Some(own.most.as_ref()?.cost / other.most.as_ref()?.cost));
            let ratios: Vec<f64> = ratios.collect();
            (!ratios.is_empty()).then(|| median(ratios.into_iter()))
        });
        row(entry, measured_here, direct, &ratios, most_ratio);
        if let (Peer::Keychoir(..), Some(bound), false) = (&entry.peer, reference.bound, ratios.is_empty()) {
            let ratio = median(ratios.iter().copied());
            if ratio > bound {
                println!(
                    "    ABOVE ITS BOUND: {ratio:.2} beside {}, where {bound:.2} is the most",
                    reference.name
                );
            }
        }
    }
}

fn row(entry: &Entry, measured: &Measured, direct: Option<&[Turn]>, ratios: &[f64], most_ratio: Option<f64>) {
    let (turns, is_direct) = (&measured.turns, entry.peer == Peer::Direct);
    let blank = String::new;
    let costs = turns.iter().map(|turn| turn.cost);
    let places = if median(costs.clone()) < 200.0 { 1 } else { 0 };
    let cost = if is_direct { blank() } else { format_median_and_range(costs, places) };
    let ratio = if ratios.is_empty() { blank() } else { format_median_and_range(ratios.iter().copied(), 2) };
    // The direct connection is the baseline of the others, and its own times are absolute.
    let added = |what: fn(&Turn) -> f64| match direct {
        Some(direct) if !is_direct => {
            median(turns.iter().zip(direct).map(|(own, direct)| what(own) - what(direct)))
        }
        _ => median(turns.iter().map(what)),
    };
    let [p50, p99, first] = [added(|turn| turn.p50), added(|turn| turn.p99), added(|turn| turn.first_p50)];
    let mut most = [blank(), blank(), most_ratio.map_or_else(blank, |ratio| format!("{ratio:.2}")), blank()];
    let find_program = || turns.iter().filter_map(|turn| turn.most.as_ref());
    if find_program().next().is_some() {
        most[0] = format!("{:.0}", median(find_program().map(|most| most.rate)));
        if !is_direct {
            most[1] = format!("{:.1}", median(find_program().map(|most| most.cost)));
            most[3] = format!("{:.0}%", median(find_program().map(|most| most.busy)) * 100.0);
        }
    }
    let [rate, its, most_ratio, busy] = most;
    let memory = if is_direct { blank() } else { format!("{:.1}", measured.memory) };
    println!(
        "{:<18}{cost:>24}{ratio:>22}{p50:>9.0}{p99:>9.0}{first:>9.0}{rate:>10}{its:>8}{most_ratio:>7}{busy:>6}{memory:>7}",
        entry.name
    );
    if turns.iter().any(|turn| !turn.is_on_time) {
        println!("    not every round could be driven at that rate");
    }
}
