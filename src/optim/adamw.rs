//! AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with torch's arithmetic, over one flat f32 buffer.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::kernels::adamw::{Norm, Update};
use crate::kernels::{bf16, elementwise};

/// The kinds of state a parameter has, as a checkpoint calls them; the last only where there are masters.
const KINDS: [&str; 3] = ["exp_avg", "exp_avg_sq", "master"];

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

impl AdamWConfig {
    /// The scalars of step `num_steps`, which counts from 1.
    fn update(self, num_steps: u64, lr: f64) -> Update {
        let Self { beta1, beta2, epsilon, weight_decay } = self;
        let t = num_steps as f64;
        Update {
            weight1: (1.0 - beta1) as f32,
            keep2: beta2 as f32,
            weight2: (1.0 - beta2) as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            step_size: (-lr / (1.0 - beta1.powf(t))) as f32,
            correction: (1.0 - beta2.powf(t)).sqrt() as f32,
            epsilon: epsilon as f32,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OptimError {
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    #[error("the optimizer's state has no `{name}`")]
    Missing { name: String },
    #[error("the optimizer's state has `{name}`, which this optimizer does not know")]
    Unknown { name: String },
    #[error("`{name}` of the optimizer's state is {found:?} of shape {found_shape:?}, expected F32 of {expected_shape:?}")]
    Shape { name: String, found: DType, found_shape: Vec<usize>, expected_shape: Vec<usize> },
    #[error("{what} has shape {found:?}, expected [{expected}]")]
    Length { what: &'static str, found: Vec<usize>, expected: usize },
}

/// The optimizer with its state for a shard of the flat parameters: two moments, the number of steps taken and, where the parameters are
/// rounded to bfloat16, their f32 masters.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// Elements of the flat buffer; all of them where the state is not sharded.
    shard: Range<usize>,
    /// `[shard.len()]` f32.
    exp_avg: Tensor,
    /// `[shard.len()]` f32.
    exp_avg_sq: Tensor,
    /// `[shard.len()]` f32; none where the parameters are their own.
    masters: Option<Tensor>,
    num_steps: u64,
}

impl AdamW {
    /// A fresh state for the elements `shard` of a flat buffer.
    pub fn new(config: AdamWConfig, shard: Range<usize>, device: &Device) -> Result<Self, OptimError> {
        let zeros = || elementwise::zeros(shard.len(), device);
        Ok(Self { config, exp_avg: zeros()?, exp_avg_sq: zeros()?, masters: None, num_steps: 0, shard })
    }

    /// With f32 masters that begin as `params` (the shard's, `[shard.len()]` f32): a step changes them, and gives the parameters their values
    /// rounded to bfloat16. What is too small to move a bfloat16 adds up in the masters (Micikevicius et al. 2018, arXiv:1710.03740).
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn with_masters(mut self, params: &Tensor) -> Result<Self, OptimError> {
        self.check("the parameter buffer", params)?;
        self.masters = Some(params.force_contiguous()?);
        Ok(self)
    }

    fn check(&self, what: &'static str, tensor: &Tensor) -> Result<(), OptimError> {
        let expected = self.shard.len();
        if tensor.dims() == [expected] { Ok(()) } else { Err(OptimError::Length { what, found: tensor.dims().to_vec(), expected }) }
    }

    /// The elements of the flat buffer that this state is for.
    pub fn shard(&self) -> Range<usize> {
        self.shard.clone()
    }

    /// Steps taken.
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// Changes `params` in place by one step along `grads` (both the shard's, `[shard.len()]` f32), clipped as the `norm` of the whole gradient
    /// says. Where that is NaN or infinite neither parameters nor moments change; the step counts all the same, since the host does not know of it yet.
    ///
    /// # Source
    /// torch's `_single_tensor_adamw`: p *= 1 - lr wd; m = lerp(m, g, 1 - beta1); v = beta2 v + (1 - beta2) g^2;
    /// p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps). Scalars in f64, elements as [`Update`] has them.
    pub fn step(&mut self, params: &Tensor, grads: &Tensor, norm: &Norm, lr: f64) -> Result<(), OptimError> {
        self.check("the parameter buffer", params)?;
        self.check("the gradient", grads)?;
        self.num_steps += 1;
        let update = self.config.update(self.num_steps, lr);
        update.apply(self.masters.as_ref().unwrap_or(params), &self.exp_avg, &self.exp_avg_sq, grads, norm.factor())?;
        if let Some(masters) = &self.masters {
            bf16::round_into_(params, masters)?;
        }
        Ok(())
    }

    /// The state by kind, for the elements `range` of the flat buffer, which lie in the shard. It shares memory with this state, and the next
    /// step changes it.
    ///
    /// # Errors
    /// When `range` reaches out of the shard.
    pub fn state(&self, range: Range<usize>) -> Result<Vec<(&'static str, Tensor)>, OptimError> {
        if range.start < self.shard.start || range.end > self.shard.end {
            return Err(OptimError::Length { what: "a part of the optimizer's state", found: vec![range.end], expected: self.shard.end });
        }
        let part = |flat: &Tensor| flat.narrow(0, range.start - self.shard.start, range.len());
        let buffers = [Some(&self.exp_avg), Some(&self.exp_avg_sq), self.masters.as_ref()];
        KINDS.into_iter().zip(buffers).filter_map(|(kind, buffer)| buffer.map(|buffer| Ok((kind, part(buffer)?)))).collect()
    }

    /// Takes over the shard's elements of what [`Self::state`] gave after `num_steps` steps, there perhaps in other shards.
    ///
    /// # Errors
    /// When a kind is missing or unknown, or has another length or dtype; the state is then unchanged.
    pub fn restore(&mut self, state: &BTreeMap<&str, Tensor>, num_steps: u64) -> Result<(), OptimError> {
        if let Some(name) = state.keys().find(|name| !self.kinds().contains(name)) {
            return Err(OptimError::Unknown { name: (*name).to_owned() });
        }
        let buffer = |kind: &str| -> Result<Tensor, OptimError> {
            let name = kind.to_owned();
            let Some(flat) = state.get(kind) else { return Err(OptimError::Missing { name }) };
            if flat.dims() != [self.shard.len()] || flat.dtype() != DType::F32 {
                let (found_shape, expected_shape) = (flat.dims().to_vec(), vec![self.shard.len()]);
                return Err(OptimError::Shape { name, found: flat.dtype(), found_shape, expected_shape });
            }
            // New memory: steps write in place.
            Ok(flat.copy()?.to_device(self.exp_avg.device())?)
        };
        let (exp_avg, exp_avg_sq) = (buffer(KINDS[0])?, buffer(KINDS[1])?);
        let masters = self.masters.as_ref().map(|_| buffer(KINDS[2])).transpose()?;
        (self.exp_avg, self.exp_avg_sq, self.masters, self.num_steps) = (exp_avg, exp_avg_sq, masters, num_steps);
        Ok(())
    }

    /// The kinds of [`Self::state`].
    pub fn kinds(&self) -> &'static [&'static str] {
        if self.masters.is_some() { &KINDS } else { &KINDS[..2] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::{CHUNK, chunk_square_sums};

    const DEFAULT: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    const OTHER: AdamWConfig = AdamWConfig { beta1: 0.3, beta2: 0.95, epsilon: 1e-6, weight_decay: 0.1 };

    fn tensor(data: &[f32]) -> Tensor {
        Tensor::new(data, &Device::Cpu).unwrap()
    }

    /// A norm that clips nothing.
    fn unclipped() -> Norm {
        Norm::new(&chunk_square_sums(&tensor(&[1.0])).unwrap(), None).unwrap()
    }

    fn start() -> Tensor {
        tensor(&[0.5, -1.25, 3.0, 1e-3, -0.7, 2.0, 0.0, -4.5, 0.123456])
    }

    fn grad(t: i32) -> Tensor {
        let value = |i: i32| 0.1 * f64::from(i + 1) * (-1f64).powi(i + t) / f64::from(t + 1) + 1e-4 * f64::from(i) * f64::from(t);
        tensor(&(0..9).map(|i| value(i) as f32).collect::<Vec<_>>())
    }

    /// Five steps at a falling rate.
    fn train(config: AdamWConfig) -> (Tensor, AdamW) {
        let (params, mut adamw) = (start(), AdamW::new(config, 0..9, &Device::Cpu).unwrap());
        for t in 0..5 {
            adamw.step(&params, &grad(t), &unclipped(), 1e-2 * f64::from(5 - t) / 5.0).unwrap();
        }
        (params, adamw)
    }

    fn assert_ulps(name: &str, ours: &Tensor, torch: [u32; 9], most: i64) {
        for (i, (x, t)) in ours.to_vec1::<f32>().unwrap().iter().zip(torch).enumerate() {
            let ulps = (i64::from(x.to_bits()) - i64::from(t)).abs();
            assert!(ulps <= most, "{name}[{i}] is {x}, torch has {}: {ulps} ulps", f32::from_bits(t));
        }
    }

    /// Parameters and moments that torch 2.15.0's `torch.optim.AdamW` had after the same five steps on a CPU.
    #[test]
    fn five_steps_equal_torch_in_the_moments_bits_and_one_ulp_of_the_parameters() {
        let (params, adamw) = train(DEFAULT);
        assert_ulps("param", &params, TORCH[0], 1);
        assert_ulps("exp_avg", &adamw.exp_avg, TORCH[1], 0);
        assert_ulps("exp_avg_sq", &adamw.exp_avg_sq, TORCH[2], 0);
        let (params, adamw) = train(OTHER);
        assert_ulps("param", &params, TORCH[3], 1);
        assert_ulps("exp_avg", &adamw.exp_avg, TORCH[4], 0);
        assert_ulps("exp_avg_sq", &adamw.exp_avg_sq, TORCH[5], 0);
    }

    const TORCH: [[u32; 9]; 6] = [
        [0x3ef8_000b, 0xbf9e_0094, 0x403e_ffa0, 0x3c87_f9ce, 0xbf37_3500, 0x4000_ff85, 0xbc80_3dde, 0xc08f_8040, 0x3ddc_c674],
        [0x3baf_d546, 0xbc2e_59bb, 0x3c85_5b7f, 0xbcad_9bf5, 0x3cde_c1ab, 0xbd02_0586, 0x3d1c_13ed, 0xbd2d_3d12, 0x3d48_c702],
        [0x3774_b5ae, 0x3874_acaa, 0x3909_ad87, 0x3974_a861, 0x39bf_3a42, 0x3a09_9df2, 0x3a3b_6817, 0x3a74_a651, 0x3a9a_e620],
        [0x3efa_39c5, 0xbf9e_45aa, 0x403e_cbe6, 0x3c2f_ea2b, 0xbf35_2d73, 0x4000_3d4f, 0xbc20_fa93, 0xc08f_41cd, 0x3de7_f455],
        [0x3c2b_92c0, 0xbca8_a50a, 0x3d03_9bc6, 0xbd27_2e2f, 0x3d5c_52db, 0xbd7a_09da, 0x3d9a_84f9, 0xbda6_72c1, 0x3dc6_e084],
        [0x3a21_05b7, 0x3b20_fd38, 0x3bb5_3407, 0x3c20_f926, 0x3c7b_afc0, 0x3cb5_16cd, 0x3cf6_a8c9, 0x3d20_f729, 0x3d4b_dfdd],
    ];

    /// The masters go the way of plain f32 parameters, and the parameters are the masters rounded.
    #[test]
    fn steps_with_masters_are_plain_steps_rounded() {
        let rounded = |t: &Tensor| -> Vec<f32> { t.to_vec1::<f32>().unwrap().iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect() };
        let params = Tensor::from_vec(rounded(&start()), 9, &Device::Cpu).unwrap();
        let (plain, mut reference) = (params.copy().unwrap(), AdamW::new(OTHER, 0..9, &Device::Cpu).unwrap());
        let mut adamw = AdamW::new(OTHER, 0..9, &Device::Cpu).unwrap().with_masters(&params).unwrap();
        for t in 0..5 {
            reference.step(&plain, &grad(t), &unclipped(), 1e-2).unwrap();
            adamw.step(&params, &grad(t), &unclipped(), 1e-2).unwrap();
            assert_eq!(adamw.masters.as_ref().unwrap().to_vec1::<f32>().unwrap(), plain.to_vec1::<f32>().unwrap(), "step {t}");
            assert_eq!(params.to_vec1::<f32>().unwrap(), rounded(&plain), "step {t}");
        }
        assert_ne!(params.to_vec1::<f32>().unwrap(), plain.to_vec1::<f32>().unwrap());
    }

    /// Bfloat16's next value above 1 is 1 + 2^-7, so that 1 + 2^-12 is 1 again: four steps are nothing, and seventeen are half of the way.
    #[test]
    fn steps_too_small_for_bfloat16_add_up_in_masters() {
        let params = tensor(&[1.0]);
        let mut adamw = AdamW::new(DEFAULT, 0..1, &Device::Cpu).unwrap().with_masters(&params).unwrap();
        let mut after = |num_steps: usize| {
            (0..num_steps).for_each(|_| adamw.step(&params, &tensor(&[-1.0]), &unclipped(), 2f64.powi(-12)).unwrap());
            params.to_vec1::<f32>().unwrap()[0]
        };
        assert_eq!(after(4), 1.0);
        assert_eq!(after(13), 1.0 + 1.0 / 128.0);
        let alone = tensor(&[1.0]);
        let mut rounding = AdamW::new(DEFAULT, 0..1, &Device::Cpu).unwrap();
        for _ in 0..17 {
            rounding.step(&alone, &tensor(&[-1.0]), &unclipped(), 2f64.powi(-12)).unwrap();
            bf16::round_(&alone).unwrap();
        }
        assert_eq!(alone.to_vec1::<f32>().unwrap(), [1.0], "without masters all steps are lost");
    }

    #[test]
    fn masters_of_a_saved_state_are_taken_over_and_missed_where_there_are_none() {
        let fresh = || AdamW::new(OTHER, 0..9, &Device::Cpu).unwrap();
        let params = tensor(&[1.0; 9]);
        let mut first = fresh().with_masters(&params).unwrap();
        first.step(&params, &grad(0), &unclipped(), 1e-3).unwrap();
        let state = |adamw: &AdamW| adamw.state(adamw.shard()).unwrap().into_iter().collect::<BTreeMap<_, _>>();
        let masters = |adamw: &AdamW| state(adamw)["master"].to_vec1::<f32>().unwrap();
        let saved: BTreeMap<_, _> = state(&first).into_iter().map(|(kind, flat)| (kind, flat.copy().unwrap())).collect();
        assert_eq!(saved.keys().collect::<Vec<_>>(), first.kinds().iter().collect::<Vec<_>>());
        let copy = params.copy().unwrap();
        let mut second = fresh().with_masters(&copy).unwrap();
        second.restore(&saved, 1).unwrap();
        for adamw in [(&mut first, &params), (&mut second, &copy)] {
            adamw.0.step(adamw.1, &grad(1), &unclipped(), 1e-3).unwrap();
        }
        assert_eq!(params.to_vec1::<f32>().unwrap(), copy.to_vec1::<f32>().unwrap());
        assert_eq!(masters(&second), masters(&first));
        let text = fresh().restore(&saved, 1).unwrap_err().to_string();
        assert_eq!(text, "the optimizer's state has `master`, which this optimizer does not know");
        let plain = state(&fresh());
        let text = fresh().with_masters(&params).unwrap().restore(&plain, 1).unwrap_err().to_string();
        assert_eq!(text, "the optimizer's state has no `master`");
    }

    #[test]
    fn first_step_moves_each_parameter_by_the_rate_against_its_gradient() {
        let params = tensor(&[1.0, 1.0, 1.0]);
        let mut adamw = AdamW::new(DEFAULT, 0..3, &Device::Cpu).unwrap();
        adamw.step(&params, &tensor(&[5.0, -1e-3, 0.0]), &unclipped(), 0.1).unwrap();
        let moved = params.to_vec1::<f32>().unwrap();
        assert!((moved[0] - 0.9).abs() < 1e-6 && (moved[1] - 1.1).abs() < 2e-6 && moved[2] == 1.0, "{moved:?}");
        assert_eq!(adamw.num_steps(), 1);
    }

    #[test]
    fn weight_decay_without_gradient_shrinks_by_rate_times_decay() {
        let params = tensor(&[2.0]);
        AdamW::new(OTHER, 0..1, &Device::Cpu).unwrap().step(&params, &tensor(&[0.0]), &unclipped(), 0.5).unwrap();
        assert_eq!(params.to_vec1::<f32>().unwrap(), [1.9]);
    }

    #[test]
    fn step_with_any_number_of_threads_has_the_same_bits() {
        let n = 3 * CHUNK + 11;
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let params = Tensor::from_iter((0..n).map(|i| (i % 101) as f32 * 0.01), &Device::Cpu).unwrap();
                let grads = Tensor::from_iter((0..n).map(|i| (i % 97) as f32 * 0.003 - 0.1), &Device::Cpu).unwrap();
                let mut adamw = AdamW::new(DEFAULT, 0..n, &Device::Cpu).unwrap();
                (0..3).for_each(|_| adamw.step(&params, &grads, &unclipped(), 1e-2).unwrap());
                params.to_vec1::<f32>().unwrap()
            })
        };
        assert_eq!(run(1), run(3));
    }

    /// Copies of the elements `range` of an optimizer's state.
    fn saved(adamw: &AdamW, range: Range<usize>) -> BTreeMap<&'static str, Tensor> {
        adamw.state(range).unwrap().into_iter().map(|(kind, flat)| (kind, flat.copy().unwrap())).collect()
    }

    #[test]
    fn state_saved_and_restored_continues_to_the_same_bits() {
        let (params, mut first) = train(OTHER);
        let state = saved(&first, 0..9);
        assert_eq!(state.keys().copied().collect::<Vec<_>>(), first.kinds());
        let copy = params.copy().unwrap();
        let mut second = AdamW::new(OTHER, 0..9, &Device::Cpu).unwrap();
        second.restore(&state, first.num_steps()).unwrap();
        first.step(&params, &grad(5), &unclipped(), 1e-3).unwrap();
        second.step(&copy, &grad(5), &unclipped(), 1e-3).unwrap();
        assert_eq!(params.to_vec1::<f32>().unwrap(), copy.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn shards_of_a_restored_state_step_to_the_bits_of_the_whole() {
        let (params, mut whole) = train(OTHER);
        let copy = params.copy().unwrap();
        let states = [0..4, 4..4, 4..9].map(|shard| (saved(&whole, shard.clone()), shard));
        whole.step(&params, &grad(5), &unclipped(), 1e-3).unwrap();
        for (state, shard) in states {
            let mut adamw = AdamW::new(OTHER, shard.clone(), &Device::Cpu).unwrap();
            adamw.restore(&state, 5).unwrap();
            let part = |flat: &Tensor| flat.narrow(0, shard.start, shard.len()).unwrap();
            adamw.step(&part(&copy), &part(&grad(5)), &unclipped(), 1e-3).unwrap();
            assert_eq!(adamw.exp_avg.to_vec1::<f32>().unwrap(), part(&whole.exp_avg).to_vec1::<f32>().unwrap());
        }
        assert_eq!(params.to_vec1::<f32>().unwrap(), copy.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn state_that_does_not_fit_is_refused_by_name() {
        let (_, mut adamw) = train(DEFAULT);
        let good = saved(&adamw, 0..9);
        let refused = |adamw: &mut AdamW, change: &dyn Fn(&mut BTreeMap<&str, Tensor>)| {
            let mut state = good.clone();
            change(&mut state);
            adamw.restore(&state, 1).unwrap_err().to_string()
        };
        let text = refused(&mut adamw, &|s| drop(s.remove("exp_avg_sq")));
        assert_eq!(text, "the optimizer's state has no `exp_avg_sq`");
        let text = refused(&mut adamw, &|s| drop(s.insert("exp_max", tensor(&[1.0]))));
        assert_eq!(text, "the optimizer's state has `exp_max`, which this optimizer does not know");
        let text = refused(&mut adamw, &|s| drop(s.insert("exp_avg", tensor(&[1.0]))));
        assert_eq!(text, "`exp_avg` of the optimizer's state is F32 of shape [1], expected F32 of [9]");
        assert_eq!(adamw.num_steps(), 5, "a refused state changes nothing");
        assert!(adamw.state(0..10).is_err());
    }

    #[test]
    fn step_with_a_gradient_of_another_length_is_refused() {
        let mut adamw = AdamW::new(DEFAULT, 0..9, &Device::Cpu).unwrap();
        let text = adamw.step(&start(), &tensor(&[1.0]), &unclipped(), 0.1).unwrap_err().to_string();
        assert_eq!(text, "the gradient has shape [1], expected [9]");
        assert_eq!(adamw.num_steps(), 0);
    }

    #[test]
    fn step_of_a_gradient_that_is_not_finite_changes_nothing_and_one_that_is_clipped_is_that_of_the_clipped_one() {
        let fresh = || {
            let params = tensor(&[0.5, -1.0, 2.0]);
            (params.copy().unwrap(), AdamW::new(OTHER, 0..3, &Device::Cpu).unwrap().with_masters(&params).unwrap())
        };
        let after = |grads: &Tensor, norm: &Norm| {
            let (params, mut adamw) = fresh();
            adamw.step(&params, grads, norm, 0.1).unwrap();
            let state = adamw.state(0..3).unwrap().into_iter().map(|(_, t)| t.to_vec1::<f32>().unwrap());
            state.chain([params.to_vec1::<f32>().unwrap()]).collect::<Vec<_>>()
        };
        let norm_of = |grads: &Tensor, max_norm| Norm::new(&chunk_square_sums(grads).unwrap(), max_norm).unwrap();
        let before = vec![vec![0.0; 3], vec![0.0; 3], vec![0.5, -1.0, 2.0], vec![0.5, -1.0, 2.0]];
        for bad in [f32::NAN, f32::INFINITY] {
            let grads = tensor(&[1.0, bad, 1.0]);
            assert_eq!(after(&grads, &norm_of(&grads, Some(1.0))), before);
        }
        let grads = tensor(&[3.0, -4.0, 12.0]);
        let clipped = tensor(&[3.0, -4.0, 12.0].map(|g: f32| g * crate::kernels::adamw::clip_factor(13.0, 2.0)));
        assert_eq!(after(&grads, &norm_of(&grads, Some(2.0))), after(&clipped, &unclipped()));
        assert_ne!(after(&grads, &norm_of(&grads, Some(2.0))), after(&grads, &unclipped()));
    }
}
