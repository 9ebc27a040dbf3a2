//! How a comparison is told.

use crate::house::{middle, spread};
use crate::peers::Peer;
use crate::rounds::{Measured, Plan, Turn};
use crate::workload::{PACED_BYTES, PACED_MS, Workload};

pub fn print(plan: &Plan, workload: Workload, measured: &[Measured]) {
    let (rate, connections) = (workload.rate(), workload.connections());
    let what = match workload {
        Workload::Paced => format!(
            "{rate} streams at once, {PACED_BYTES} B every {PACED_MS} ms; of each piece and not of a request"
        ),
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            format!("{rate} requests/s over {connections} connections")
        }
    };
    println!("\n{}: {what}; {} rounds of {} s in turns", workload.name(), plan.rounds, plan.seconds);
    println!(
        "{:<16}{:>22}{:>22}{:>9}{:>9}{:>9}{:>10}{:>9}{:>7}{:>8}",
        "",
        "processor, µs",
        "beside nginx",
        "p50 +µs",
        "p99 +µs",
        "first +",
        "most/s",
        "its µs",
        "busy",
        "MiB"
    );
    let of = |peer: &Peer| plan.peers.iter().position(|own| own == peer).map(|place| &measured[place].turns);
    let (direct, nginx) = (of(&Peer::Direct).unwrap(), of(&Peer::Nginx));
    for (peer, measured) in plan.peers.iter().zip(measured) {
        row(workload, peer, measured, direct, nginx);
    }
}

fn row(workload: Workload, peer: &Peer, measured: &Measured, direct: &[Turn], nginx: Option<&Vec<Turn>>) {
    let turns = &measured.turns;
    let is_direct = *peer == Peer::Direct;
    let mut line = format!("{:<16}", peer.name());
    // Nothing in between costs nothing, and what it takes is told as it is.
    let costs = turns.iter().map(|turn| turn.cost);
    line += &format!("{:>22}", if is_direct { String::new() } else { spread(costs, 1) });
    let ratios = nginx.map(|nginx| turns.iter().zip(nginx).map(|(own, nginx)| own.cost / nginx.cost));
    let ratio = match &ratios {
        Some(ratios) if !is_direct && *peer != Peer::Nginx => spread(ratios.clone(), 2),
        _ => String::new(),
    };
    line += &format!("{ratio:>22}");
    for (what, width) in [(p50 as fn(&Turn) -> f64, 9), (p99, 9), (first, 9)] {
        let added = |(own, direct): (&Turn, &Turn)| what(own) - if is_direct { 0.0 } else { what(direct) };
        line += &format!("{:>width$.0}", middle(turns.iter().zip(direct).map(added)));
    }
    if turns[0].most.is_some() {
        let most = || turns.iter().filter_map(|turn| turn.most.as_ref());
        line += &format!("{:>10.0}", middle(most().map(|most| most.rate)));
        if !is_direct {
            line += &format!("{:>9.1}", middle(most().map(|most| most.cost)));
            line += &format!("{:>6.0}%", middle(most().map(|most| most.busy)) * 100.0);
        }
    }
    if !is_direct {
        let width = if turns[0].most.is_some() { 8 } else { 34 };
        line += &format!("{:>width$.1}", measured.memory);
    }
    println!("{line}");
    if turns.iter().any(|turn| !turn.is_on_time) {
        println!("    not every round could be driven at that rate");
    }
    if let (Peer::Keychoir(..), Some(ratios)) = (peer, ratios) {
        let (ratio, bound) = (middle(ratios), workload.bound());
        if ratio > bound {
            println!("    ABOVE ITS BOUND: {ratio:.2} beside nginx, where {bound:.2} is the most");
        }
    }
}

fn p50(turn: &Turn) -> f64 {
    turn.p50
}

fn p99(turn: &Turn) -> f64 {
    turn.p99
}

fn first(turn: &Turn) -> f64 {
    turn.first_p50
}
