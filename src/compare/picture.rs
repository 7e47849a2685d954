//! The comparison as a picture: held-out loss over trainable parameters, and bars of drift and speed. SVG written out: three charts of known
//! form need no library.

use std::fmt::Write as _;

use super::Report;
use super::table::small;
use crate::telemetry::thousands;

/// The picture's name in the comparison's output folder.
pub const FILE: &str = "compare.svg";

const INK: &str = "#24292f";
const FAINT: &str = "#d0d7de";
const DOT: &str = "#0969da";
const DRIFT: &str = "#bc4c00";
const SPEED: &str = "#1a7f37";
const WIDTH: f64 = 1080.0;
/// Left edge, top, width of the scatter chart; the bars stand right of it.
const PLOT: (f64, f64, f64) = (70.0, 50.0, 480.0);
const DOT_RADIUS: f64 = 5.0;
const BARS_LEFT: f64 = 600.0;
const BAR: f64 = 18.0;
const LABEL_HEIGHT: f64 = 15.0;
/// Width of a letter at the labels' size, about.
const LETTER: f64 = 6.6;

/// A run in the scatter chart.
struct Point<'a> {
    label: &'a str,
    x: f64,
    y: f64,
}

/// A linear or logarithmic scale from values to pixels.
#[derive(Clone, Copy)]
struct Scale {
    values: (f64, f64),
    pixels: (f64, f64),
}

impl Scale {
    fn at(self, value: f64) -> f64 {
        let share = (value - self.values.0) / (self.values.1 - self.values.0);
        self.pixels.0 + share * (self.pixels.1 - self.pixels.0)
    }
}

/// The picture of what is finished so far.
pub fn svg(report: &Report) -> String {
    let trained: Vec<_> = report.trained().collect();
    let drift: Vec<_> = trained.iter().filter_map(|(label, f)| Some((*label, f.drift_kl?))).collect();
    let speed: Vec<_> = trained.iter().filter_map(|(label, f)| Some((*label, f.tokens_per_second?))).collect();
    let bars_height = |n: usize| 46.0 + BAR * n as f64;
    let height = (60.0 + bars_height(drift.len()) + bars_height(speed.len())).max(440.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"{INK}\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    let s = &report.shared;
    let budget = format!("{} steps, {} tokens for each method", thousands(s.steps), thousands(s.budget_tokens));
    text(&mut out, 20.0, 24.0, "start", &format!("Held-out loss over trainable parameters ({budget})"));
    let points: Vec<Point> = trained
        .iter()
        .filter_map(|(label, f)| Some(Point { label, x: (f.trainable_parameters.max(1) as f64).log10(), y: f.held_out_loss? }))
        .collect();
    scatter(&mut out, &points, report.base_held_out_loss, height);
    bars(&mut out, 24.0, "Drift from the base: KL in nats per token", &drift, DRIFT, small);
    bars(&mut out, 24.0 + bars_height(drift.len()), "Tokens a second", &speed, SPEED, |x| thousands(x.round() as u64));
    out.push_str("</svg>\n");
    out
}

fn scatter(out: &mut String, points: &[Point], base: Option<f64>, height: f64) {
    let (left, top, width) = PLOT;
    let bottom = height - 50.0;
    let powers = bounds(points.iter().map(|p| p.x)).map_or((0.0, 1.0), |(lo, hi)| (lo.floor(), hi.ceil().max(lo.floor() + 1.0)));
    let (low, high) = bounds(points.iter().map(|p| p.y).chain(base)).unwrap_or((0.0, 1.0));
    let margin = ((high - low) * 0.12).max(0.01 * high.abs()).max(1e-6);
    let x = Scale { values: powers, pixels: (left, left + width) };
    let y = Scale { values: (low - margin, high + margin), pixels: (bottom, top) };
    for power in powers.0 as i32..=powers.1 as i32 {
        let at = x.at(f64::from(power));
        line(out, (at, top), (at, bottom), FAINT, "");
        text(out, at, bottom + 18.0, "middle", &short_power(power));
    }
    for tick in ticks(y.values) {
        line(out, (left, y.at(tick.0)), (left + width, y.at(tick.0)), FAINT, "");
        text(out, left - 8.0, y.at(tick.0) + 4.0, "end", &format!("{:.*}", tick.1, tick.0));
    }
    text(out, left + width / 2.0, bottom + 38.0, "middle", "trainable parameters (logarithmic)");
    if let Some(base) = base {
        line(out, (left, y.at(base)), (left + width, y.at(base)), INK, " stroke-dasharray=\"5 4\"");
        text(out, left + 6.0, y.at(base) - 5.0, "start", &format!("base {base:.3}"));
    }
    // What stands in a label's way, as (left, right, middle): every point, and the labels before it.
    let mut taken: Vec<(f64, f64, f64)> = points.iter().map(|p| (x.at(p.x) - DOT_RADIUS, x.at(p.x) + DOT_RADIUS, y.at(p.y))).collect();
    let mut by_height: Vec<&Point> = points.iter().collect();
    by_height.sort_by(|a, b| b.y.total_cmp(&a.y));
    for point in &by_height {
        _ = writeln!(out, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{DOT_RADIUS}\" fill=\"{DOT}\"/>", x.at(point.x), y.at(point.y));
    }
    for point in by_height {
        let (px, py) = (x.at(point.x), y.at(point.y));
        let room = point.label.chars().count() as f64 * LETTER + 10.0;
        let goes_left = px + room > BARS_LEFT - 10.0;
        let (from, to) = if goes_left { (px - room, px - 6.0) } else { (px + 6.0, px + room) };
        let mut at = py;
        while let Some(&(_, _, above)) = taken.iter().find(|(a, b, h)| from < *b && *a < to && (at - h).abs() < LABEL_HEIGHT) {
            at = above + LABEL_HEIGHT;
        }
        taken.push((from, to, at));
        let (anchor, side) = if goes_left { ("end", -1.0) } else { ("start", 1.0) };
        if at != py {
            line(out, (px, py), (px + side * 9.0, at), INK, " stroke-width=\"0.6\"");
        }
        text(out, px + side * 10.0, at + 4.0, anchor, point.label);
    }
}

fn bars(out: &mut String, top: f64, title: &str, values: &[(&str, f64)], color: &str, show: impl Fn(f64) -> String) {
    text(out, BARS_LEFT, top, "start", title);
    let names = values.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0) as f64 * LETTER;
    let zero = BARS_LEFT + names + 10.0;
    let greatest = values.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    for (i, &(label, value)) in values.iter().enumerate() {
        let at = top + 12.0 + BAR * i as f64;
        let length = if greatest > 0.0 { value / greatest * (WIDTH - 90.0 - zero) } else { 0.0 };
        text(out, zero - 6.0, at + 11.0, "end", label);
        _ = writeln!(out, "<rect x=\"{zero:.1}\" y=\"{at:.1}\" width=\"{length:.1}\" height=\"{:.1}\" fill=\"{color}\"/>", BAR - 4.0);
        text(out, zero + length + 6.0, at + 11.0, "start", &show(value));
    }
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |bounds, v| Some(bounds.map_or((v, v), |(lo, hi): (f64, f64)| (lo.min(v), hi.max(v)))))
}

/// Four to ten round values inside a range, and the decimals that they need.
fn ticks((low, high): (f64, f64)) -> Vec<(f64, usize)> {
    let rough = (high - low) / 9.0;
    let unit = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|k| k * unit).find(|s| *s >= rough).unwrap_or(10.0 * unit);
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    let first = (low / step).ceil() as i64;
    (first..).map(|k| k as f64 * step).take_while(|t| *t <= high).map(|t| (t, decimals)).collect()
}

/// `10k` for 4.
fn short_power(power: i32) -> String {
    let (exponent, unit) = match power {
        9.. => (power - 9, "G"),
        6.. => (power - 6, "M"),
        3.. => (power - 3, "k"),
        _ => (power, ""),
    };
    format!("1{}{unit}", "0".repeat(exponent.max(0) as usize))
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), color: &str, extra: &str) {
    _ = writeln!(out, "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{color}\"{extra}/>", from.0, from.1, to.0, to.1);
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    let escaped = content.replace('&', "&amp;").replace('<', "&lt;");
    _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{escaped}</text>");
}

#[cfg(test)]
mod tests {
    use super::super::{Entry, Figures, RunResult, Shared};
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let values = |range| ticks(range).iter().map(|(t, d)| format!("{t:.d$}")).collect::<Vec<_>>();
        assert_eq!(values((3.03, 4.1)), ["3.2", "3.4", "3.6", "3.8", "4.0"]);
        assert_eq!(values((-1.0, 12.0)), ["0", "2", "4", "6", "8", "10", "12"]);
        assert_eq!(values((0.0, 0.004)), ["0.0000", "0.0005", "0.0010", "0.0015", "0.0020", "0.0025", "0.0030", "0.0035", "0.0040"]);
    }

    fn report(points: &[(&str, u64, f64)]) -> Report {
        let shared = Shared {
            base_fingerprint: String::new(),
            tokenizer_sha256: String::new(),
            computed_on: String::new(),
            base_parameters: 1,
            train_rows: 1,
            train_tokens: 1,
            held_out_rows: 1,
            held_out_tokens: 1,
            drift_rows: 1,
            steps: 1,
            rows_per_step: 1,
            budget_tokens: 1,
        };
        let mut report = Report::new(shared);
        for &(label, trainable_parameters, loss) in points {
            let figures = Figures {
                trainable_parameters,
                peak_rss_bytes: None,
                peak_is_of_this_run: true,
                tokens_per_second: Some(1.0),
                train_loss: None,
                held_out_loss: Some(loss),
                drift_kl: Some(0.0),
                weight_bytes: 1,
                steps: 1,
                seconds: 0.0,
                world_size: 1,
            };
            report.put(Entry { label: label.to_owned(), plan: serde_json::Value::Null, result: Some(RunResult::Trained(figures)) });
        }
        report
    }

    /// (x, y) of the text `label` that is drawn first: the scatter chart's.
    fn place(svg: &str, label: &str) -> (f64, f64) {
        let line = svg.lines().find(|l| l.contains(&format!(">{label}<"))).unwrap();
        let number = |name: &str| line.split(&format!(" {name}=\"")).nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
        (number("x"), number("y"))
    }

    #[test]
    fn labels_of_equal_points_stand_below_each_other() {
        let picture = svg(&report(&[("a", 1000, 3.0), ("b", 1000, 3.0), ("c", 1000, 3.0), ("d", 900_000, 2.0)]));
        let mut heights = ["a", "b", "c"].map(|label| place(&picture, label).1);
        heights.sort_by(f64::total_cmp);
        assert!(heights.windows(2).all(|pair| pair[1] - pair[0] >= LABEL_HEIGHT - 0.2), "{heights:?}");
        assert!(place(&picture, "d").1 > heights[2], "a lower loss stands lower");
        assert!(place(&picture, "d").0 > place(&picture, "a").0);
    }

    #[test]
    fn picture_of_nothing_and_of_strange_labels_is_sound() {
        for points in [&[][..], &[("<&", 0, 0.0)]] {
            let picture = svg(&report(points));
            assert!(!picture.contains("NaN") && !picture.contains("inf") && !picture.contains("<&"), "{picture}");
            assert!(picture.ends_with("</svg>\n"));
        }
    }

    #[test]
    fn powers_of_ten_have_short_names() {
        assert_eq!([0, 2, 3, 5, 6, 8, 10].map(short_power), ["1", "100", "1k", "100k", "1M", "100M", "10G"]);
    }
}
