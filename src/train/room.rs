//! A run that cannot fit into memory is refused before it loads its model.
//!
//! What it surely takes ([`least_rank_bytes`]) is held against what the machine has left, or what `memory_limit` allows. A run that is let
//! pass may still come to take more; one that is refused would have been killed. What is said to fit fits by the plan's whole figure.

use std::fmt;
use std::num::NonZeroUsize;

use super::TrainError;
use super::together::together;
use crate::config::Plan;
use crate::config::arithmetic::{Arithmetic, RankBytes, RowLengths, least_rank_bytes, rank_bytes_of_rows};
use crate::config::plan::{BatchPlan, MemoryLimit, Recompute};
use crate::dist::ProcessGroup;
use crate::model::shape::ModelShape;
use crate::peft::MethodError;
use crate::telemetry::{Memory, bytes};

/// Tokens of the shortest row that there can be: `[gMASK] sop`, one of a question, one of an answer, eos.
const LEAST_ROW_TOKENS: u64 = 5;

/// What the ranks of a machine may take, and where the figure is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub bytes: u64,
    pub is_given: bool,
    pub ranks_here: u64,
}

impl Room {
    /// `None`: nobody looks, or the system does not say.
    pub fn new(limit: Option<MemoryLimit>, group: &dyn ProcessGroup) -> Option<Self> {
        let (bytes, is_given) = match limit {
            Some(MemoryLimit::None) => return None,
            Some(MemoryLimit::Bytes(bytes)) => (bytes, true),
            None => (Memory::of_this_machine()?.free(), false),
        };
        Some(Self { bytes, is_given, ranks_here: group.local_size() as u64 })
    }

    fn of_a_rank(&self) -> u64 {
        self.bytes / self.ranks_here.max(1)
    }
}

/// More than there is.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// What is too large.
    what: String,
    need: RankBytes,
    room: Room,
    /// Changes of the command after which it fits, with what a rank then takes.
    fitting: Vec<(String, u64)>,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, need, room, .. } = self;
        write!(f, "{what} needs at least {} of memory", bytes(need.total()))?;
        if room.ranks_here > 1 {
            let all = need.total().saturating_mul(room.ranks_here);
            write!(f, " a rank, {} for the {} ranks of this machine", bytes(all), room.ranks_here)?;
        }
        if room.is_given {
            write!(f, ", and `memory_limit` is {}", bytes(room.bytes))?;
        } else {
            write!(f, ", and {} are free", bytes(room.bytes))?;
        }
        let parts = [
            (need.weights, "weights, in f32"),
            (need.trained_parameters, "trained parameters"),
            (need.moments, "their two moments"),
            (need.masters, "their f32 masters"),
            (need.slot_sums, "gradients"),
            (need.saved_activations, "activations"),
            (need.logits, "logits"),
        ];
        parts.into_iter().filter(|(n, _)| *n > 0).try_for_each(|(n, part)| write!(f, "\n  {} {part}", bytes(n)))
    }
}

impl std::error::Error for TooLarge {}

impl TooLarge {
    /// What to do about it.
    pub fn hint(&self) -> String {
        let other = changes_text(&self.fitting);
        let limit = if self.room.is_given { "a larger `--memory_limit`, or `--memory_limit none`," } else { "`--memory_limit none`" };
        format!("{other}; {limit} starts it all the same")
    }
}

/// What to do, given the changes after which it fits.
fn changes_text(fitting: &[(String, u64)]) -> String {
    let fitting: Vec<String> = fitting.iter().map(|(change, need)| format!("{change} (about {} a rank)", bytes(*need))).collect();
    if fitting.is_empty() {
        "use a machine with more memory, or a smaller model".to_owned()
    } else {
        format!("it fits with {}", fitting.join(", or with "))
    }
}

/// Says that a given limit is of no use for a run on a GPU.
pub(super) fn say_unheld(limit: Option<MemoryLimit>, group: &dyn ProcessGroup) {
    if let (Some(MemoryLimit::Bytes(_)), 0) = (limit, group.rank()) {
        tracing::warn!("`memory_limit` is of the host's memory, and this run is held in the GPU's: nothing is held against it");
    }
}

/// Tests that a run can fit. Every rank calls it, with the same plan; `what` names the run.
///
/// # Errors
/// When it cannot, or the method's settings name parts that the model does not have.
pub fn expect_room(what: &str, shape: &ModelShape, plan: &Plan, lengths: &RowLengths, group: &dyn ProcessGroup) -> Result<(), TrainError> {
    together(group, || {
        let Some(room) = Room::new(plan.run.memory_limit, group) else { return Ok(()) };
        match too_large(what, shape, plan, lengths, room)? {
            Some(too_large) => Err(too_large.into()),
            None => Ok(()),
        }
    })
}

/// Why the run `what` cannot fit into `room`, if that is known.
fn too_large(what: &str, shape: &ModelShape, plan: &Plan, lengths: &RowLengths, room: Room) -> Result<Option<TooLarge>, MethodError> {
    let need = least_rank_bytes(shape, plan, lengths)?;
    if need.total() <= room.of_a_rank() {
        return Ok(None);
    }
    let fitting = fitting(shape, plan, lengths, room)?;
    Ok(Some(TooLarge { what: what.to_owned(), need, room, fitting }))
}

/// Changes of the command after which it surely fits over such rows, with what a rank then takes.
fn fitting(shape: &ModelShape, plan: &Plan, lengths: &RowLengths, room: Room) -> Result<Vec<(String, u64)>, MethodError> {
    let fits = |variant: &Variant| -> Result<Option<(String, u64)>, MethodError> {
        let need = rank_bytes_of_rows(shape, &variant.plan, lengths)?.total();
        let room = Room { ranks_here: variant.ranks_here as u64, ..room };
        Ok((need <= room.of_a_rank()).then(|| (variant.change.clone(), need)))
    };
    let mut fitting = Vec::new();
    for kind in variants(plan, room.ranks_here as usize) {
        fitting.extend(kind.iter().find_map(|variant| fits(variant).transpose()).transpose()?);
    }
    if fitting.is_empty() {
        fitting.extend(fits(&smallest(plan, room.ranks_here as usize))?);
    }
    Ok(fitting)
}

/// What `glmddp plan` says of a `memory_limit`, all ranks on one machine: that a training is refused whatever its rows, or that the longest
/// rows that the plan allows would not fit. The rows are not tokenized here.
///
/// # Errors
/// When the method's settings name parts that the model does not have.
pub fn limit_warning(
    shape: &ModelShape,
    plan: &Plan,
    arithmetic: &Arithmetic,
    num_rows: Option<u64>,
) -> Result<Option<String>, MethodError> {
    let Some(MemoryLimit::Bytes(limit)) = plan.run.memory_limit else { return Ok(None) };
    let ranks_here = plan.batch.world_size.get() as u64;
    let room = Room { bytes: limit, is_given: true, ranks_here };
    // No row has fewer tokens than its template.
    let lengths = RowLengths { shortest: LEAST_ROW_TOKENS, longest: LEAST_ROW_TOKENS, num_rows: num_rows.unwrap_or(0) };
    let (least, most) = (least_rank_bytes(shape, plan, &lengths)?.total(), arithmetic.rank_bytes.total());
    let all = |rank: u64| match ranks_here {
        1 => String::new(),
        n => format!(" a rank, {} if all {n} ranks run on one machine", bytes(rank.saturating_mul(n))),
    };
    let limit = bytes(limit);
    let said = if least > room.of_a_rank() {
        format!("`train` refuses this: it needs at least {} of memory{}, and `memory_limit` is {limit}", bytes(least), all(least))
    } else if most > room.of_a_rank() {
        format!(
            "`memory_limit` is {limit}, and this may take about {} of memory{}: `train` refuses it if the rows of the data are too long",
            bytes(most),
            all(most)
        )
    } else {
        return Ok(None);
    };
    let longest = RowLengths { longest: arithmetic.max_row_tokens + 1, ..lengths };
    Ok(Some(format!("{said}; {}", changes_text(&fitting(shape, plan, &longest, room)?))))
}

/// Tests that a model's weights can fit, in f32, as they are loaded. Every rank calls it.
///
/// # Errors
/// When they cannot.
pub fn expect_room_for_weights(
    what: &str,
    shape: &ModelShape,
    limit: Option<MemoryLimit>,
    group: &dyn ProcessGroup,
) -> Result<(), TrainError> {
    together(group, || {
        let Some(room) = Room::new(limit, group) else { return Ok(()) };
        let need = RankBytes::of_weights(shape);
        if need.total() <= room.of_a_rank() {
            return Ok(());
        }
        let fewer = (1..room.ranks_here).rev().find(|&ranks| need.total() <= (Room { ranks_here: ranks, ..room }).of_a_rank());
        let fitting = fewer.map(|ranks| (format!("{} on this machine", ranks_text(ranks as usize)), need.total()));
        Err(TooLarge { what: what.to_owned(), need, room, fitting: fitting.into_iter().collect() }.into())
    })
}

fn ranks_text(ranks: usize) -> String {
    if ranks == 1 { "1 rank".to_owned() } else { format!("{ranks} ranks") }
}

/// A run that takes less and computes the same.
struct Variant {
    /// What is to be given.
    change: String,
    plan: Plan,
    ranks_here: usize,
}

/// Changes of one kind each, the mildest first.
fn variants(plan: &Plan, ranks_here: usize) -> Vec<Vec<Variant>> {
    let changed = |change: String, ranks_here: usize, edit: &dyn Fn(&mut Plan)| {
        let mut plan = plan.clone();
        edit(&mut plan);
        Variant { change, plan, ranks_here }
    };
    let mut kinds = Vec::new();
    if plan.model.recompute == Recompute::None {
        kinds.push(vec![changed("`--recompute block`".to_owned(), ranks_here, &|plan| plan.model.recompute = Recompute::Block)]);
    }
    if !plan.optim.shard_optimizer && plan.batch.world_size.get() > 1 {
        kinds.push(vec![changed("`--shard_optimizer`".to_owned(), ranks_here, &|plan| plan.optim.shard_optimizer = true)]);
    }
    let fewer_rows = (1..plan.batch.rows_per_slot.get()).rev().filter_map(|rows| with_rows(&plan.batch, rows));
    kinds.push(fewer_rows.map(|(change, batch)| changed(change, ranks_here, &|plan| plan.batch = batch)).collect());
    let fewer_ranks = (1..ranks_here).rev().filter_map(|ranks| {
        let (slots, world_size) = (plan.batch.slots_per_step.get(), plan.batch.world_size.get() * ranks / ranks_here);
        let world_size = NonZeroUsize::new(world_size).filter(|n| slots.is_multiple_of(n.get()))?;
        Some(changed(format!("{} on this machine", ranks_text(ranks)), ranks, &|plan| plan.batch.world_size = world_size))
    });
    kinds.push(fewer_ranks.collect());
    kinds
}

/// The same step in micro-batches of `rows` rows, where the ranks can share it.
fn with_rows(batch: &BatchPlan, rows: usize) -> Option<(String, BatchPlan)> {
    let rows_per_step = batch.rows_per_step();
    let slots = rows_per_step.is_multiple_of(rows * batch.world_size.get()).then_some(rows_per_step / rows)?;
    let batch = BatchPlan { rows_per_slot: NonZeroUsize::new(rows)?, slots_per_step: NonZeroUsize::new(slots)?, ..*batch };
    Some((format!("`--per_device_train_batch_size {rows} --global_batch_size {rows_per_step}`"), batch))
}

/// All that saves memory at once.
fn smallest(plan: &Plan, ranks_here: usize) -> Variant {
    let mut variant = Variant { change: String::new(), plan: plan.clone(), ranks_here };
    let mut changes = Vec::new();
    for kind in variants(plan, ranks_here) {
        // Fewer ranks stand for themselves: the optimizer's shards grow with them.
        let Some(last) = kind.into_iter().rfind(|change| change.ranks_here == ranks_here) else { continue };
        let Plan { model, batch, optim, .. } = last.plan;
        let smaller = &mut variant.plan;
        smaller.model.recompute = if model.recompute == plan.model.recompute { smaller.model.recompute } else { model.recompute };
        smaller.batch = if batch == plan.batch { smaller.batch } else { batch };
        smaller.optim.shard_optimizer |= optim.shard_optimizer;
        changes.push(last.change);
    }
    variant.change = changes.join(" ").replace("` `", " ");
    variant
}
