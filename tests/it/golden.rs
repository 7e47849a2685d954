//! Golden values: found by discovery, compared against the noise floor that comes with them.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use crate::support;

/// How many times the noise floor (largest |f32 - f64| of the reference itself) a tensor may be off.
pub const ALLOWED: f64 = 10.0;
/// Half a unit in the last place of the largest value: nothing computed in f32 has less noise than its own rounding.
const ROUNDING: f64 = 1.0 / 16_777_216.0;

/// Golden file -> tensor -> (largest |f32 - f64|, largest |f64|).
type NoiseTable = BTreeMap<String, BTreeMap<String, (f64, f64)>>;

/// A case: a folder with a model in `hf/` and golden files beside it.
pub struct Case {
    pub dir: PathBuf,
    noise: NoiseTable,
}

/// All cases under the golden roots; fails when there is none at all.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for root in support::golden_roots() {
        let Ok(entries) = std::fs::read_dir(&root) else { continue };
        let mut dirs: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).filter(|p| p.join("hf/config.json").exists()).collect();
        dirs.sort();
        for dir in dirs {
            let table = |name: &str| -> Option<NoiseTable> {
                let text = std::fs::read_to_string(dir.join(name)).ok()?;
                Some(serde_json::from_str(&text).unwrap())
            };
            let mut noise = table("f32_vs_f64.json").unwrap();
            noise.extend(table("f32_vs_f64_methods.json").into_iter().flatten());
            cases.push(Case { dir, noise });
        }
    }
    assert!(!cases.is_empty(), "no golden case under {:?}", support::golden_roots());
    cases
}

impl Case {
    pub fn name(&self) -> String {
        self.dir.file_name().unwrap().to_string_lossy().into_owned()
    }

    pub fn tensors(&self, file: &str) -> Option<BTreeMap<String, Tensor>> {
        let path = self.dir.join(format!("{file}.safetensors"));
        path.exists().then(|| load(&path))
    }

    pub fn json(&self, file: &str) -> Option<serde_json::Value> {
        let text = std::fs::read_to_string(self.dir.join(format!("{file}.json"))).ok()?;
        Some(serde_json::from_str(&text).unwrap())
    }

    /// Starts the comparison with one golden file; none where the case does not have it.
    pub fn compare(&self, file: &str) -> Option<Comparison<'_>> {
        let (golden, worst) = (self.tensors(file)?, (0.0, String::new()));
        Some(Comparison { case: self, file: file.to_owned(), golden, limits: None, worst, num_compared: 0, faults: Vec::new() })
    }

    /// As [`Self::compare`], of results in 16 bits: the error of each tensor, ||x - golden|| / ||golden||, against `share` of that of PyTorch in
    /// bfloat16. The error of a mean loss is small by luck, for errors of both signs cancel in it; so it is held against that of the losses that it is the mean of.
    pub fn compare_in_16_bits(&self, file: &str, share: f64) -> Option<Comparison<'_>> {
        let errors: BTreeMap<String, BTreeMap<String, [f64; 3]>> = serde_json::from_value(self.json("torch_bf16_vs_f64")?).unwrap();
        let errors = errors.get(file)?;
        let limit = |name: &String| {
            let losses = name.strip_suffix(".loss").map(|variant| format!("{variant}.token_loss"));
            errors[losses.filter(|losses| errors.contains_key(losses)).as_ref().unwrap_or(name)][0]
        };
        let limits = errors.keys().map(|name| (name.clone(), share * limit(name))).collect();
        Some(Comparison { limits: Some(limits), ..self.compare(file)? })
    }
}

pub fn load(path: &Path) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect()
}

pub struct Comparison<'a> {
    case: &'a Case,
    file: String,
    pub golden: BTreeMap<String, Tensor>,
    /// By tensor, what a result in 16 bits may be off relative to its norm; `None`: results in f32, held against the noise floor.
    limits: Option<BTreeMap<String, f64>>,
    worst: (f64, String),
    num_compared: usize,
    faults: Vec<String>,
}

impl Comparison<'_> {
    /// Holds `ours` against golden tensor `name`.
    pub fn check(&mut self, name: &str, ours: &Tensor) {
        self.check_except(name, ours, 0.0, &|_| false);
    }

    /// How noisy the values are at the end of training, relative to their size: the largest deviation of the parameter in the middle.
    /// (Not of the quietest: which parameter a chaotic run spares differs from one order of summation to the next.)
    pub fn relative_noise(&self) -> f64 {
        let last = self.case.noise[&self.file].iter().filter(|(name, _)| name.starts_with("after") && !name.starts_with("after1."));
        let mut all: Vec<f64> = last.map(|(_, (noise, largest))| noise / largest).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    }

    /// As [`Self::check`], leaving out elements whose exact gradient is 0 (`zero`). In a trained parameter AdamW moves an element by up to the learning
    /// rate however small its gradient, so where the exact gradient is next to zero rounding decides: one element in a thousand (at least one) may
    /// be off by up to `stray`.
    pub fn check_except(&mut self, name: &str, ours: &Tensor, stray: f64, zero: &dyn Fn(usize) -> bool) {
        let Some(golden) = self.golden.get(name) else {
            self.faults.push(format!("{name}: is not in the golden file"));
            return;
        };
        if ours.dims() != golden.dims() {
            self.faults.push(format!("{name}: shape {:?}, golden {:?}", ours.dims(), golden.dims()));
            return;
        }
        let flat = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (a, b) = (flat(ours), flat(golden));
        if let Some(limits) = &self.limits {
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let (error, size) = (norm(&mut a.iter().zip(&b).map(|(x, y)| x - y)), norm(&mut b.iter().copied()));
            // On the scale of the other ratios: ALLOWED is the limit. What is 0 must be 0.
            return self.record(name, if error == 0.0 { 0.0 } else { ALLOWED * (error / size) / limits[name] });
        }
        let (noise, largest) = self.case.noise[&self.file][name];
        let floor = noise.max(largest * ROUNDING);
        let mut off: Vec<f64> = a
            .iter()
            .zip(&b)
            .enumerate()
            .filter(|(i, _)| !zero(*i))
            .map(|(_, (x, y))| if x.is_finite() { (x - y).abs() } else { f64::INFINITY })
            .collect();
        off.sort_by(|x, y| y.total_cmp(x));
        let num_strays = if stray > 0.0 {
            off.iter().take((off.len() / 1000).max(1)).filter(|&&x| x > ALLOWED * floor && x <= stray).count()
        } else {
            0
        };
        if num_strays > 0 {
            println!(
                "golden {:<12} {}: {name}: {num_strays} of {} elements off by up to {:.1e} (gradient next to zero)",
                self.case.name(),
                self.file,
                off.len(),
                off[0]
            );
        }
        let off = off.get(num_strays).copied().unwrap_or(0.0);
        self.record(name, if off == 0.0 { 0.0 } else { off / floor });
    }

    fn record(&mut self, name: &str, ratio: f64) {
        self.num_compared += 1;
        // A NaN is worse than any number.
        let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
        if ratio >= self.worst.0 {
            self.worst = (ratio, name.to_owned());
        }
        if ratio > ALLOWED {
            self.faults.push(format!("{name}: {:.2} of what is allowed", ratio / ALLOWED));
        }
    }

    /// Holds a number against the golden one; `relative` is what is allowed.
    pub fn check_number(&mut self, name: &str, ours: f64, golden: f64, relative: f64) {
        // On the scale of the other ratios: ALLOWED is the limit.
        self.record(name, ALLOWED * (ours - golden).abs() / (golden.abs() * relative));
    }

    pub fn fault(&mut self, fault: String) {
        self.faults.push(fault);
    }

    /// Prints the line of this file and fails if anything was off.
    #[track_caller]
    pub fn finish(self) {
        let Self { case, file, limits, worst: (ratio, name), num_compared, faults, .. } = self;
        let worst = match limits {
            None => format!("{ratio:>6.2} x noise floor"),
            Some(_) => format!("{:>6.2} of what is allowed", ratio / ALLOWED),
        };
        println!("golden {:<12} {file:<24} {num_compared:>4} compared, worst {worst} ({name})", case.name());
        assert!(num_compared > 0, "{} {file}: nothing was compared", case.name());
        assert!(faults.is_empty(), "{} {file}:\n  {}", case.dir.display(), faults.join("\n  "));
    }
}
