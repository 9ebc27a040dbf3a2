//! Prints the results of a comparison as a table with one row per proxy, with the ratios to a reference row, and with
//! warnings about ratios above the maximum and rates that were not reached.

use crate::harness::{format_median_and_range, median};
use crate::peers::Peer;
use crate::rounds::{ComparedPeer, PeerResults, RoundPlan, TurnResults};
use crate::workload::{PACED_CHUNK_BYTES, PACED_INTERVAL_MS, Workload};

/// The row that other rows are compared with.
pub struct Reference {
    pub name: &'static str,
    /// The index of the row, or `None` if it was not measured.
    pub index: Option<usize>,
    /// The maximum ratio of Keychoir's cost to the cost of the reference.
    pub max_ratio: Option<f64>,
}

/// Returns the title of a table: the workload, its rate and connections, and the rounds.
pub fn title(plan: &RoundPlan, workload: Workload) -> String {
    let (rate, connections) = (workload.rate(), workload.connections());
    let load = match workload {
        Workload::Paced => {
            format!(
                "{rate} concurrent streams, {PACED_CHUNK_BYTES} B every {PACED_INTERVAL_MS} ms; values are per chunk"
            )
        }
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            format!("{rate} requests/s over {connections} connections")
        }
    };
    format!("{}: {load}; {} rounds of {} s, alternating", workload.name(), plan.rounds, plan.seconds)
}

/// Prints a table. Also prints a line if the cost of Keychoir exceeds its maximum ratio.
pub fn print(
    title: &str,
    compared_peers: &[ComparedPeer],
    peer_results: &[PeerResults],
    reference: &Reference,
) {
    let other_loads = peer_results.iter().flat_map(|results| &results.turns).map(|turn| turn.other_load);
    println!("\n{title}; others had {:.0}% of this machine", median(other_loads) * 100.0);
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
    let direct_index = compared_peers.iter().position(|compared_peer| compared_peer.peer == Peer::Direct);
    let direct_turns = direct_index.map(|index| &*peer_results[index].turns);
    for (index, (compared_peer, row_results)) in compared_peers.iter().zip(peer_results).enumerate() {
        let reference_turns = reference.index.map(|index| &*peer_results[index].turns);
        let ratios: Vec<f64> = match reference_turns {
            Some(turns) if compared_peer.peer != Peer::Direct && reference.index != Some(index) => {
                row_results.turns.iter().zip(turns).map(|(own, other)| own.cost / other.cost).collect()
            }
            _ => Vec::new(),
        };
        let max_rate_ratio = reference_turns.filter(|_| !ratios.is_empty()).and_then(|turns| {
            let pairs = row_results.turns.iter().zip(turns);
            let ratios = pairs
                .filter_map(|(own, other)| Some(own.max_rate.as_ref()?.cost / other.max_rate.as_ref()?.cost));
            let ratios: Vec<f64> = ratios.collect();
            (!ratios.is_empty()).then(|| median(ratios.into_iter()))
        });
        print_row(compared_peer, row_results, direct_turns, &ratios, max_rate_ratio);
        if let (Peer::Keychoir(..), Some(max_ratio), false) =
            (&compared_peer.peer, reference.max_ratio, ratios.is_empty())
        {
            let ratio = median(ratios.iter().copied());
            if ratio > max_ratio {
                println!(
                    "    ABOVE ITS BOUND: {ratio:.2} beside {}, more than {max_ratio:.2}",
                    reference.name
                );
            }
        }
    }
}

fn print_row(
    compared_peer: &ComparedPeer,
    peer_results: &PeerResults,
    direct_turns: Option<&[TurnResults]>,
    ratios: &[f64],
    max_rate_ratio: Option<f64>,
) {
    let (turns, is_direct) = (&peer_results.turns, compared_peer.peer == Peer::Direct);
    let empty_cell = String::new;
    let costs = turns.iter().map(|turn| turn.cost);
    let decimals = if median(costs.clone()) < 200.0 { 1 } else { 0 };
    let cost = if is_direct { empty_cell() } else { format_median_and_range(costs, decimals) };
    let ratio =
        if ratios.is_empty() { empty_cell() } else { format_median_and_range(ratios.iter().copied(), 2) };
    // Times are relative to the direct connection. The times of the direct connection itself are absolute.
    let added_time = |field: fn(&TurnResults) -> f64| match direct_turns {
        Some(direct_turns) if !is_direct => {
            median(turns.iter().zip(direct_turns).map(|(own, direct)| field(own) - field(direct)))
        }
        _ => median(turns.iter().map(field)),
    };
    let [p50, p99, first] =
        [added_time(|turn| turn.p50), added_time(|turn| turn.p99), added_time(|turn| turn.first_byte_p50)];
    let max_rate_ratio = max_rate_ratio.map_or_else(empty_cell, |ratio| format!("{ratio:.2}"));
    let (mut rate, mut rate_cost, mut utilization) = (empty_cell(), empty_cell(), empty_cell());
    let max_rates = || turns.iter().filter_map(|turn| turn.max_rate.as_ref());
    if max_rates().next().is_some() {
        rate = format!("{:.0}", median(max_rates().map(|max_rate| max_rate.requests_per_second)));
        if !is_direct {
            rate_cost = format!("{:.1}", median(max_rates().map(|max_rate| max_rate.cost)));
            utilization = format!("{:.0}%", median(max_rates().map(|max_rate| max_rate.utilization)) * 100.0);
        }
    }
    let memory = if is_direct { empty_cell() } else { format!("{:.1}", peer_results.memory_mib) };
    println!(
        "{:<18}{cost:>24}{ratio:>22}{p50:>9.0}{p99:>9.0}{first:>9.0}{rate:>10}{rate_cost:>8}{max_rate_ratio:>7}{utilization:>6}{memory:>7}",
        compared_peer.name
    );
    if turns.iter().any(|turn| !turn.has_reached_rate) {
        println!("    not every round reached the rate");
    }
}
