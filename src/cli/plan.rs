//! `glmddp plan`: the resolved run with its arithmetic.

use std::path::Path;

use clap::Args;

use super::run_args::RunArgs;
use super::text::columns;
use super::{base_warnings, environment, report};
use crate::config::Plan;
use crate::config::arithmetic::{Arithmetic, Length, plan_arithmetic, plan_length};
use crate::config::plan::{BatchPlan, DataPlan, Duration, Recompute, Resume, TimeLimit, WeightDtype};
use crate::config::surprises::surprises;
use crate::config::values::name_of;
use crate::data::DataError;
use crate::data::column_use::ColumnUse;
use crate::data::rows::Rows;
use crate::dist::Solo;
use crate::model::shape::ModelShape;
use crate::peft::{MethodError, bare};
use crate::telemetry::{bytes, si, thousands};
use crate::train::room;

/// Show what a run would do: rows a step, steps, tokens, FLOPs, memory
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Number of ranks [default: that of mpirun, or 1]
    #[arg(long, value_name = "N", help_heading = "Plan")]
    pub ranks: Option<usize>,
    /// Print JSON
    #[arg(long, help_heading = "Plan")]
    pub json: bool,
}

pub fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let plan = args.run.load()?.resolve(args.ranks.or_else(environment::launched_size).unwrap_or(1))?;
    if !environment::is_first_rank() {
        return Ok(());
    }
    base_warnings::of_template(&plan.model.model_name_or_path, &Solo)?;
    let shape = model_shape(&plan.model.model_name_or_path)?;
    let arithmetic = shape.as_ref().map(|shape| plan_arithmetic(shape, &plan)).transpose()?;
    let num_rows = num_train_rows(&plan.data)?;
    let mut warnings = surprises(&plan, num_rows);
    if let Some((shape, arithmetic)) = shape.as_ref().zip(arithmetic.as_ref()) {
        warnings.extend(room::limit_warning(shape, &plan, arithmetic, num_rows)?);
    }
    report::warn(&warnings);
    let length = plan_length(&plan, num_rows);
    let text = if args.json {
        let json = serde_json::json!({ "plan": plan, "length": length, "shape": shape, "arithmetic": arithmetic });
        format!("{json:#}\n")
    } else {
        table(&plan, &length, shape.as_ref().zip(arithmetic.as_ref()))
    };
    report::print(&text)?;
    Ok(())
}

/// The model's sizes; none if its folder is not there yet.
fn model_shape(dir: &Path) -> Result<Option<ModelShape>, MethodError> {
    if dir.exists() { bare::open_if_there(dir).map(|(config, _)| Some(ModelShape::from(&config))) } else { Ok(None) }
}

/// Rows that the training takes, good or bad; none if the file is not there yet.
fn num_train_rows(data: &DataPlan) -> Result<Option<u64>, DataError> {
    if !data.train_file.exists() {
        return Ok(None);
    }
    let columns = data.columns();
    let mut rows = Rows::open(&data.train_file, &columns)?;
    let mut column_use = ColumnUse::default();
    let limit = data.max_train_samples.map_or(u64::MAX, |n| n as u64);
    let mut num_rows = 0;
    while num_rows < limit
        && let Some(raw) = rows.next_raw()?
    {
        num_rows += 1;
        // A bad row is counted here; the training says what is bad.
        if let Ok(row) = rows.parser().parse(&raw) {
            column_use.push(&row.beside);
        }
    }
    column_use.check(&columns, &data.train_file)?;
    report::warn(&column_use.report(&columns, &data.train_file));
    Ok(Some(num_rows))
}

/// `4 rows x 4 accumulation x 2 ranks = 32 rows a step`.
pub fn batch_line(batch: &BatchPlan) -> String {
    let (rows, accumulation, ranks) = (batch.rows_per_slot, batch.accumulation_steps(), batch.world_size);
    format!("{rows} rows x {accumulation} accumulation x {ranks} ranks = {} rows a step", batch.rows_per_step())
}

/// The plan for people, without or with what follows from the model's sizes.
pub fn table(plan: &Plan, length: &Length, costs: Option<(&ModelShape, &Arithmetic)>) -> String {
    let mut rows = vec![
        ("model", model_text(plan, costs)),
        ("method", method_text(plan, costs.map(|c| c.1))),
        ("data", data_text(plan)),
        ("batch", batch_line(&plan.batch)),
        ("length", length_text(plan, length)),
        ("optimizer", optimizer_text(plan, length)),
    ];
    if let Some((_, a)) = costs {
        rows.extend([("tokens", tokens_text(plan, length, a)), ("flops", flops_text(plan, length, a)), ("memory", memory_text(plan, a))]);
    }
    rows.push(("output", output_text(plan)));
    columns(&rows.into_iter().map(|(label, text)| (label.to_owned(), text)).collect::<Vec<_>>())
}

fn model_text(plan: &Plan, costs: Option<(&ModelShape, &Arithmetic)>) -> String {
    let path = plan.model.model_name_or_path.display();
    match costs {
        Some((s, a)) => {
            let trained = match a.trained_base_parameters {
                0 => "frozen".to_owned(),
                n if n == a.base_parameters => "all trained".to_owned(),
                n => format!("{} of them trained", thousands(n)),
            };
            format!(
                "{path}\n{} layers, hidden {}, {} heads in {} groups, vocabulary {}: {} parameters, {trained}",
                s.layers,
                s.hidden,
                s.heads,
                s.groups,
                thousands(s.vocab),
                thousands(a.base_parameters)
            )
        }
        None => format!("{path}\nno such folder yet: tokens, FLOPs and memory are left out"),
    }
}

fn method_text(plan: &Plan, arithmetic: Option<&Arithmetic>) -> String {
    let mut text = plan.method.settings().describe();
    if let Some(a) = arithmetic {
        let share = 100.0 * a.trainable_parameters as f64 / a.base_parameters as f64;
        text += &format!("\n{} trainable parameters = {share:.2} % of the base", thousands(a.trainable_parameters));
    }
    text
}

fn data_text(plan: &Plan) -> String {
    let data = &plan.data;
    let history = data.history_column.as_ref().map(|h| format!(", history `{h}`")).unwrap_or_default();
    let input = data.input_column.as_ref().map(|name| format!(" and `{name}`")).unwrap_or_default();
    let (prompt, response) = (&data.prompt_column, &data.response_column);
    let mut text = format!("{}: prompt `{prompt}`{input}, answer `{response}`{history}", data.train_file.display());
    if let Some(file) = &data.validation_file {
        text += &format!("\nheld out: {}", file.display());
    }
    text + &format!("\na row has at most {} + {} + eos tokens", data.max_source_length, data.max_target_length)
}

fn length_text(plan: &Plan, length: &Length) -> String {
    let rows_per_step = plan.batch.rows_per_step() as u64;
    match (plan.run.duration, length.steps) {
        (Duration::Steps(steps), _) | (Duration::Epochs(_), Some(steps)) => {
            let total = thousands(steps.saturating_mul(rows_per_step));
            let epochs = length.epochs.map(|e| format!(" = {e:.2} epochs")).unwrap_or_default();
            format!("{} steps x {rows_per_step} rows = {total} rows{epochs}", thousands(steps))
        }
        (Duration::Epochs(epochs), None) => format!("{epochs} epochs"),
    }
}

fn optimizer_text(plan: &Plan, length: &Length) -> String {
    let o = &plan.optim;
    let warmup = length.warmup_steps.map_or_else(|| "a share of all".to_owned(), thousands);
    let clip = o.max_grad_norm.map_or_else(|| "no clipping".to_owned(), |n| format!("gradient norm clipped to {n}"));
    format!(
        "AdamW, peak learning rate {:e}, {warmup} steps of warm-up, then {}\nbetas {} {}, epsilon {:e}, weight decay {}, {clip}\nloss: {} mean; gradients: {}",
        o.learning_rate,
        name_of(&o.lr_scheduler_type),
        o.adam_beta1,
        o.adam_beta2,
        o.adam_epsilon,
        o.weight_decay,
        name_of(&o.loss_mean),
        name_of(&o.reduction)
    )
}

fn tokens_text(plan: &Plan, length: &Length, a: &Arithmetic) -> String {
    let rows = plan.batch.rows_per_step() as u64;
    let step = rows * a.max_row_tokens;
    let all = length.steps.map(|n| format!(", {} in all", si(step as f64 * n as f64))).unwrap_or_default();
    format!("at most {} a row x {rows} rows = {} a step{all}", a.max_row_tokens, thousands(step))
}

fn flops_text(plan: &Plan, length: &Length, a: &Arithmetic) -> String {
    let (flops, weights) = (&a.token_flops, a.matmul_weights as f64);
    let per_weight = |flops: u64| {
        let text = format!("{:.2}", flops as f64 / weights);
        format!("{}N", text.trim_end_matches('0').trim_end_matches('.'))
    };
    let again = match plan.model.recompute {
        Recompute::None => String::new(),
        Recompute::Block => format!(", {} forward again", per_weight(flops.trunk_recompute)),
    };
    let gradients = match a.trained_base_parameters {
        0 => "the base's weights get no gradient",
        n if n == a.base_parameters => "inputs and weights get gradients",
        _ => "of the base's weights, those that train get gradients",
    };
    let forward = flops.trunk_forward + flops.head_forward;
    let backward = flops.trunk_backward + flops.head - flops.head_forward;
    let all = length.steps.map(|n| format!(", {}FLOP in all", si(a.max_step_flops as f64 * n as f64))).unwrap_or_default();
    format!(
        "{} = {}FLOP a token: {} forward{again}, {} backward; N = {} weights in products\n{gradients}\nat most {}FLOP a step with attention, head on targets only{all}",
        per_weight(flops.trunk() + flops.head),
        si((flops.trunk() + flops.head) as f64),
        per_weight(forward),
        per_weight(backward),
        si(weights),
        si(a.max_step_flops as f64)
    )
}

fn memory_text(plan: &Plan, a: &Arithmetic) -> String {
    let m = &a.rank_bytes;
    let rows = plan.batch.rows_per_slot;
    let part = |held, whole| if held < whole { format!(", one of {} shards", plan.batch.world_size) } else { String::new() };
    let (rounded, masters) = match plan.model.torch_dtype {
        WeightDtype::Float32 => ("", String::new()),
        WeightDtype::Bfloat16 => {
            (" (weights rounded to bf16 too)", format!("{} their f32 masters{}\n", bytes(m.masters), part(m.masters, m.trained_parameters)))
        }
    };
    let frozen = if m.weights > 0 { format!("{} frozen weights\n", bytes(m.weights)) } else { String::new() };
    format!(
        "about {} a rank, in f32{rounded}:\n{frozen}{} trained parameters\n{} their gradient{}\n{} their two moments{}\n{masters}{} gradient sums, {} slots a rank\n{} activations of {rows} rows\n{} logits",
        bytes(m.total()),
        bytes(m.trained_parameters),
        bytes(m.gradient),
        part(m.gradient, m.trained_parameters),
        bytes(m.moments),
        part(m.moments, 2 * m.trained_parameters),
        bytes(m.slot_sums),
        plan.batch.accumulation_steps(),
        bytes(m.saved_activations),
        bytes(m.logits)
    )
}

fn output_text(plan: &Plan) -> String {
    let run = &plan.run;
    let save = run.save_steps.map_or_else(|| "save at the end".to_owned(), |n| format!("save every {n} steps"));
    let best = if run.save_best { ", the best" } else { "" };
    let every = run.save_keep_every.map_or_else(String::new, |n| format!(", those of each {n} steps"));
    let keep = run.save_total_limit.map_or_else(String::new, |n| format!(" and keep {n}{best}{every}"));
    let evaluate = run.eval_steps.map_or_else(String::new, |n| format!(", evaluate every {n}"));
    let limit = match run.save_before_timeout {
        None => String::new(),
        Some(TimeLimit::After(span)) => format!("\nsave and stop before {span} are over"),
        Some(TimeLimit::Slurm) => "\nsave and stop before the end of the Slurm job".to_owned(),
    };
    let resume = match &run.resume {
        Resume::No => String::new(),
        Resume::Latest => "\ngo on from its newest checkpoint".to_owned(),
        Resume::Path(path) => format!("\ngo on from {}", path.display()),
    };
    format!("{}\nlog every {} steps, {save}{keep}{evaluate}; seed {}{limit}{resume}", run.output_dir.display(), run.logging_steps, run.seed)
}
