//! What follows from a plan's numbers and is hardly meant: lines that a run and `glmddp plan` show before the first step.
//!
//! Each line has the figures and what to do. Nothing here stops a run; what cannot give anything is an error of `super::resolve`.

use super::arithmetic::{plan_length, total_steps};
use super::plan::{Duration, Plan, Warmup};
use super::resolve::{ADAM_EPSILON, LOGGING_STEPS, MAX_GRAD_NORM, SAVE_STEPS};
use crate::optim::Schedule;

/// Epochs may end so much later than was asked for, since steps are whole.
const MAX_OVERSHOOT: f64 = 1.05;
/// A step of AdamW moves a value by about the learning rate; f32 has no such small change of a common value.
const LEAST_RATE: f64 = 1e-9;

/// The lines for `plan` over `num_rows` training rows, in a fixed order; empty if there is nothing to say. What depends on the number of
/// rows is left out where it is not known.
pub fn surprises(plan: &Plan, num_rows: Option<u64>) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(num_rows) = num_rows.filter(|&n| n > 0) {
        lines.extend(epochs(plan, num_rows));
    }
    if let Some(total) = plan_length(plan, num_rows).steps {
        lines.extend(warmup(plan, total));
        lines.extend(never_due(plan, total));
    }
    lines.extend(small_steps(plan));
    lines.extend(held_out_rows(plan));
    lines
}

/// Held-out rows that are the training rows.
fn held_out_rows(plan: &Plan) -> Option<String> {
    let file = plan.data.validation_file.as_ref()?;
    let train = &plan.data.train_file;
    let is_same = file == train || file.canonicalize().ok().is_some_and(|file| train.canonicalize().is_ok_and(|train| file == train));
    is_same.then(|| {
        format!(
            "`validation_file` is `train_file` ({}): the held-out loss is that of rows that were trained on; give other rows, or leave \
             `--validation_file` out",
            file.display()
        )
    })
}

fn counted(steps: u64) -> String {
    if steps == 1 { "1 step".to_owned() } else { format!("{steps} steps") }
}

/// A step that is larger than the data, or epochs that no whole number of steps comes near.
fn epochs(plan: &Plan, num_rows: u64) -> Option<String> {
    let rows_per_step = plan.batch.rows_per_step() as u64;
    let steps = total_steps(plan, num_rows);
    let done = steps as f64 * rows_per_step as f64 / num_rows as f64;
    let asked = match plan.run.duration {
        Duration::Epochs(asked) => Some(asked),
        Duration::Steps(_) => None,
    };
    let is_too_large = rows_per_step > num_rows;
    if !is_too_large && asked.is_none_or(|asked| done <= MAX_OVERSHOOT * asked) {
        return None;
    }
    let said = if is_too_large {
        let times = rows_per_step as f64 / num_rows as f64;
        format!("a step of {rows_per_step} rows is larger than the data: each of the {num_rows} rows is in it {times:.2} times")
    } else {
        format!("a run has whole steps, of {rows_per_step} rows each, and there are {num_rows} rows")
    };
    let asked = asked.map(|asked| format!(", {asked} asked for")).unwrap_or_default();
    let are = if steps == 1 { "is" } else { "are" };
    Some(format!("{said}; {} {are} {done:.2} epochs{asked}; {}", counted(steps), smaller_step(plan, num_rows)))
}

/// What to do about a step that does not fit `num_rows` rows.
fn smaller_step(plan: &Plan, num_rows: u64) -> String {
    let (ranks, micro) = (plan.batch.world_size.get() as u64, plan.batch.rows_per_slot.get() as u64);
    let rows_per_step = plan.batch.rows_per_step() as u64;
    let fits = |rows: u64| match plan.run.duration {
        Duration::Steps(_) => true,
        Duration::Epochs(asked) => {
            let exact = num_rows as f64 * asked / rows as f64;
            exact.ceil() <= MAX_OVERSHOOT * exact
        }
    };
    // The largest step that the ranks can share; else one that is at least no larger than the data.
    let largest = |unit: u64| (1..=num_rows.min(rows_per_step) / unit).rev().take(1 << 12).map(|n| n * unit).find(|&rows| fits(rows));
    let any = |unit: u64| Some(num_rows / unit * unit).filter(|&rows| rows > 0);
    let is_too_large = rows_per_step > num_rows;
    let (keys, rows, more) = match (largest(ranks * micro), largest(ranks)) {
        (Some(rows), _) => ("", rows, ""),
        (None, Some(rows)) => ("--per_device_train_batch_size 1 ", rows, ""),
        (None, None) if !is_too_large => return format!("ask for what is done with `--max_steps {}`", total_steps(plan, num_rows)),
        (None, None) => match (any(ranks * micro), any(ranks)) {
            (Some(rows), _) => ("", rows, " --max_steps 1"),
            (None, Some(rows)) => ("--per_device_train_batch_size 1 ", rows, " --max_steps 1"),
            (None, None) => return format!("start at most {num_rows} ranks, or give more rows"),
        },
    };
    format!("use `{keys}--global_batch_size {rows}{more}` without `--gradient_accumulation_steps`")
}

/// A learning rate that is still rising when the run ends.
fn warmup(plan: &Plan, total: u64) -> Option<String> {
    let o = &plan.optim;
    let warmup_steps = o.warmup.steps(total);
    if warmup_steps == 0 || warmup_steps < total {
        return None;
    }
    let schedule = Schedule { kind: o.lr_scheduler_type, base_lr: o.learning_rate, warmup_steps, total_steps: total };
    let highest = schedule.lr(total.saturating_sub(1));
    let end = if highest > 0.0 {
        format!("it ends at {}, below its peak of {:e}", three_figures(highest), o.learning_rate)
    } else {
        "it is 0 in every step, and nothing is trained".to_owned()
    };
    let less = match o.warmup {
        Warmup::Steps(_) => format!("--warmup_steps {}", total / 10),
        Warmup::Ratio(_) if total > 1 => "--warmup_ratio 0.1".to_owned(),
        Warmup::Ratio(_) => "--warmup_ratio 0".to_owned(),
    };
    let rise = counted(warmup_steps);
    Some(format!("the learning rate rises over {rise}, and the run has {total}: {end}; use `{less}`, or more steps"))
}

/// `1.33e-2`, and `1e-6` where the other figures are 0.
fn three_figures(x: f64) -> String {
    let text = format!("{x:.2e}");
    let Some((figures, exponent)) = text.split_once('e') else { return text };
    format!("{}e{exponent}", figures.trim_end_matches('0').trim_end_matches('.'))
}

/// What is to happen every N steps of a run that is shorter. Defaults are passed over: nobody asked for them.
fn never_due(plan: &Plan, total: u64) -> Vec<String> {
    let run = &plan.run;
    let asked = |value: Option<std::num::NonZeroUsize>, default: usize| value.map(|n| n.get()).filter(|&n| n != default);
    let all = [
        ("save_steps", asked(run.save_steps, SAVE_STEPS), "the one checkpoint is that of the last step"),
        ("eval_steps", asked(run.eval_steps, 0), "the held-out loss is computed only at the end"),
        ("save_keep_every", asked(run.save_keep_every, 0), "it keeps no checkpoint"),
        ("logging_steps", asked(Some(run.logging_steps), LOGGING_STEPS), "only the first and the last step are shown"),
    ];
    let late = all.into_iter().filter_map(|(key, every, end)| Some((key, every.filter(|&n| n as u64 > total)?, end)));
    late.map(|(key, every, end)| format!("`{key}` is {every}, and the run has {}: {end}; use at most {total}", counted(total))).collect()
}

/// Settings under which AdamW hardly moves a value.
fn small_steps(plan: &Plan) -> Vec<String> {
    let o = &plan.optim;
    let mut lines = Vec::new();
    if o.learning_rate < LEAST_RATE {
        lines.push(format!(
            "`learning_rate` is {:e}: a step moves a value by about that, which f32 values above {:.0e} do not show; use more",
            o.learning_rate,
            o.learning_rate * f64::from(1 << 24)
        ));
    }
    if let Some(norm) = o.max_grad_norm.filter(|&norm| norm <= o.adam_epsilon) {
        let share = 100.0 * norm / (norm + o.adam_epsilon);
        // The one that is far from its default.
        let advice = match (o.adam_epsilon < MAX_GRAD_NORM, norm > ADAM_EPSILON) {
            (true, _) => format!("use a larger `--max_grad_norm`, such as {MAX_GRAD_NORM}"),
            (false, true) => format!("use a smaller `--adam_epsilon`, such as {ADAM_EPSILON:e}"),
            (false, false) => format!("use `--max_grad_norm {MAX_GRAD_NORM} --adam_epsilon {ADAM_EPSILON:e}`"),
        };
        lines.push(format!(
            "`max_grad_norm` {norm:e} is no more than `adam_epsilon` {:e}: a step moves a value by at most {share:.0} % of the learning \
             rate; {advice}",
            o.adam_epsilon
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RunConfig, Sources};

    fn lines(world_size: usize, num_rows: u64, change: impl Fn(&mut RunConfig)) -> Vec<String> {
        let mut config = RunConfig::default();
        config.model.model_name_or_path = Some("m".into());
        config.data.train_file = Some("t".into());
        config.run.output_dir = Some("o".into());
        change(&mut config);
        surprises(&config.resolve(world_size, &Sources::default()).unwrap(), Some(num_rows))
    }

    #[test]
    fn published_recipe_and_whole_epochs_are_no_surprise() {
        assert_eq!(lines(1, 114_599, |_| {}), [""; 0]);
        for (num_rows, epochs) in [(16, 1.0), (160, 2.0), (1000, 1.0), (32, 0.5)] {
            assert_eq!(lines(2, num_rows, |config| config.run.num_train_epochs = Some(epochs)), [""; 0], "{num_rows} rows");
        }
    }

    #[test]
    fn advice_about_steps_and_epochs_leads_to_no_other_surprise() {
        for world_size in [1, 2, 4] {
            for (num_rows, micro, epochs) in (1..40).flat_map(|n| [1, 2, 4].map(|m| [0.001, 0.5, 1.0, 3.0].map(|e| (n, m, e)))).flatten() {
                let set = |config: &mut RunConfig| {
                    config.batch.per_device_train_batch_size = Some(micro);
                    config.run.num_train_epochs = Some(epochs);
                };
                let Some(line) = lines(world_size, num_rows, set).pop() else { continue };
                let value = |key: &str| line.split_once(key)?.1.split([' ', '`']).next()?.parse::<usize>().ok();
                if let Some(ranks) = value("start at most ") {
                    assert!(ranks < world_size, "{line}");
                    continue;
                }
                let again = lines(world_size, num_rows, |config| {
                    set(config);
                    config.batch.global_batch_size = value("--global_batch_size ");
                    config.batch.per_device_train_batch_size = value("--per_device_train_batch_size ").or(Some(micro));
                    config.run.max_steps = value("--max_steps ").map(|n| n as i64);
                });
                assert_eq!(again, [""; 0], "{line}");
            }
        }
    }

    #[test]
    fn advice_about_clipping_leads_to_no_other_surprise() {
        for (norm, epsilon) in [(1.0, 1.0), (1.0, 50.0), (0.5, 0.5), (0.5, 1.0), (1e-9, 1e-8), (1e-9, 2.0), (7.0, 7.0)] {
            let set = |config: &mut RunConfig| {
                (config.optim.max_grad_norm, config.optim.adam_epsilon) = (Some(norm), Some(epsilon));
            };
            let all = lines(1, 114_599, set);
            let [line] = all.as_slice() else { panic!("{norm} {epsilon}: {all:?}") };
            let value = |key: &str| {
                let text = line.split_once(&format!("--{key}"))?.1.trim_start_matches(['`', ',']).trim_start_matches(" such as ");
                text.split([' ', '`']).find(|word| !word.is_empty())?.parse::<f64>().ok()
            };
            let (more, less) = (value("max_grad_norm"), value("adam_epsilon"));
            assert!(more.is_none_or(|more| more > norm) && less.is_none_or(|less| less < epsilon), "{line}");
            let again = lines(1, 114_599, |config| {
                (config.optim.max_grad_norm, config.optim.adam_epsilon) = (Some(more.unwrap_or(norm)), Some(less.unwrap_or(epsilon)));
            });
            assert_eq!(again, [""; 0], "{line}");
        }
    }

    #[test]
    fn advice_about_the_warm_up_leads_to_no_other_surprise() {
        for total in [1, 2, 9, 10, 300] {
            for (steps, ratio) in [(Some(total), None), (Some(10 * total), None), (None, Some(1.0))] {
                let set = |config: &mut RunConfig| {
                    config.run.max_steps = Some(total as i64);
                    (config.optim.warmup_steps, config.optim.warmup_ratio) = (steps, ratio);
                };
                let all = lines(1, 1000, set);
                let [line] = all.as_slice() else { panic!("{total} {steps:?} {ratio:?}: {all:?}") };
                let value = |key: &str| line.split_once(key)?.1.split('`').next()?.parse::<f64>().ok();
                let again = lines(1, 1000, |config| {
                    set(config);
                    if let Some(steps) = value("--warmup_steps ") {
                        config.optim.warmup_steps = Some(steps as u64);
                    } else {
                        config.optim.warmup_ratio = value("--warmup_ratio ");
                    }
                });
                assert_eq!(again, [""; 0], "{line}");
            }
        }
    }
}
