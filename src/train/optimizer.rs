//! AdamW over the ranks. Its state is dealt to them (ZeRO-1: Rajbhandari et al. 2020, arXiv:1910.02054): each rank holds the moments of its
//! shard of the flat parameters, steps on that shard, and takes the others' from their owners. Or each rank keeps all of it, as a group of
//! its own: then the same calls move nothing between ranks.
//!
//! Shards begin at multiples of [`optim::CHUNK`], and what is summed over them is summed chunk by chunk in the order of the whole buffer: a
//! step has the same bits whether and how its optimizer is sharded.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Tensor};

use super::TrainError;
use crate::dist::{self, Collectives, Shards, Solo, Wire};
use crate::kernels::host::on_host;
use crate::kernels::{bf16, elementwise};
use crate::optim::{self, AdamW, AdamWConfig, NonFinite, Norm};
use crate::params::Layout;

/// AdamW with the ranks that share its state. Its methods are collectives of these ranks, but for those that say so.
pub struct Optimizer<'g> {
    adamw: AdamW,
    /// All ranks, or this one alone.
    peers: &'g dyn Collectives,
    shards: Shards,
    /// In which form parameters travel.
    wire: Wire,
}

impl Optimizer<'static> {
    /// Each rank holds the state of all `num_elements` parameters.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn replicated(config: AdamWConfig, num_elements: usize, device: &Device) -> Result<Self, TrainError> {
        Optimizer::sharded(config, num_elements, device, &Solo)
    }
}

impl<'g> Optimizer<'g> {
    /// Each rank of `peers` holds the state of its own shard of `num_elements` parameters. Not collective.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn sharded(config: AdamWConfig, num_elements: usize, device: &Device, peers: &'g dyn Collectives) -> Result<Self, TrainError> {
        let shards = Shards::new(num_elements, peers.group().world_size(), optim::CHUNK);
        Ok(Self { adamw: AdamW::new(config, shards.range(peers.group().rank()), device)?, peers, shards, wire: Wire::F32 })
    }

    /// With f32 masters of the flat parameters `params`, which hold values of bfloat16 from now on, dealt to the ranks as the moments are. Not
    /// collective.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn with_masters(mut self, params: &Tensor) -> Result<Self, TrainError> {
        bf16::round_(params)?;
        let shard = self.shard_of(params)?;
        self.adamw = self.adamw.with_masters(&shard)?;
        self.wire = Wire::Bf16;
        Ok(self)
    }

    /// How the parameters are dealt to the ranks that share the state. Not collective.
    pub fn shards(&self) -> Shards {
        self.shards
    }

    /// This rank's shard of a flat buffer; it shares its memory. Not collective.
    ///
    /// # Errors
    /// When `flat` is too short.
    pub fn shard_of(&self, flat: &Tensor) -> Result<Tensor, TrainError> {
        let own = self.adamw.shard();
        Ok(flat.narrow(0, own.start, own.len())?)
    }

    /// The first element of the gradient that is not finite, from each rank's `shard` of it.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn first_non_finite(&self, shard: &Tensor, layout: &Layout) -> Result<Option<NonFinite>, TrainError> {
        let mine = optim::first_non_finite(shard)?.map_or(Vec::new(), |(at, value)| {
            let at = self.adamw.shard().start + at;
            vec![at as u64, u64::from(value.to_bits())]
        });
        // Shards ascend with the rank: the first that comes is the first of all.
        let all = self.gather_words(&mine)?;
        let Some(&[at, value]) = all.first_chunk::<2>() else { return Ok(None) };
        Ok(Some(NonFinite::locate(at as usize, f32::from_bits(value as u32), layout)?))
    }

    /// The norm of the gradient, from each rank's `shard` of it, to be clipped to `max_norm`: the bits that it has on one rank.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn norm(&self, shard: &Tensor, max_norm: Option<f64>) -> Result<Norm, TrainError> {
        let mine = optim::chunk_square_sums(shard)?;
        // Zeros add nothing.
        let mine = elementwise::padded(&mine, 2 * self.shards.longest().div_ceil(optim::CHUNK))?;
        Ok(Norm::new(&self.peers.all_gather(&mine)?.flatten_all()?, max_norm)?)
    }

    /// Changes this rank's shard of the flat parameters by one step along its `shard` of the gradient, of which the whole has this `norm`; nothing
    /// changes where that is NaN or infinite. Not collective.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn step(&mut self, params: &Tensor, shard: &Tensor, norm: &Norm, lr: f64) -> Result<(), TrainError> {
        Ok(self.adamw.step(&self.shard_of(params)?, shard, norm, lr)?)
    }

    /// Brings the others' shards of the flat parameters up to date, in place.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn gather(&self, params: &Tensor) -> Result<(), TrainError> {
        Ok(dist::all_gather_shards(self.peers, params, &self.shards, self.wire)?)
    }

    /// The elements of the flat buffer whose state this rank holds. Not collective.
    pub fn shard(&self) -> Range<usize> {
        self.adamw.shard()
    }

    /// The moments that every rank must have alike, by name: all where each rank keeps all, none where the ranks share them. Not collective.
    /// They are in the host's memory, which may be this state's.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn common(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>, TrainError> {
        let mut tensors = BTreeMap::new();
        if self.shards.world_size() == 1 {
            for (kind, flat) in self.state(self.shard())? {
                let flat = on_host(&flat)?;
                tensors.extend(layout.views(&flat)?.into_iter().map(|(name, tensor)| (format!("{kind}.{name}"), tensor)));
            }
        }
        Ok(tensors)
    }

    /// This rank's state by kind, for elements `range` of its shard, for a checkpoint; it may share memory with this state, and the next step
    /// changes it. Not collective.
    ///
    /// # Errors
    /// When `range` reaches out of the shard.
    pub fn state(&self, range: Range<usize>) -> Result<Vec<(&'static str, Tensor)>, TrainError> {
        Ok(self.adamw.state(range)?)
    }

    /// The kinds of [`Self::state`]. Not collective.
    pub fn kinds(&self) -> &'static [&'static str] {
        self.adamw.kinds()
    }

    /// Takes over this rank's shard of the state after `num_steps` steps on any number of ranks. Not collective.
    ///
    /// # Errors
    /// As [`AdamW::restore`].
    pub fn restore(&mut self, state: &BTreeMap<&str, Tensor>, num_steps: u64) -> Result<(), TrainError> {
        Ok(self.adamw.restore(state, num_steps)?)
    }

    /// The ranks' words, one rank behind the other.
    fn gather_words(&self, mine: &[u64]) -> Result<Vec<u64>, TrainError> {
        Ok(dist::gather_words(self.peers.group(), "its part of a norm or check", mine)?.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::{GradientSum, Part, Reduction, local};
    use crate::rng::{KeyedRng, Stream};

    const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
    const NUM_SLOTS: usize = 7;

    fn random(key: usize, n: usize) -> Tensor {
        Tensor::from_vec(KeyedRng::new(5, Stream::ParameterInit, key as u64).normal(n), n, &Device::Cpu).unwrap()
    }

    /// Two parameters in `n` elements.
    fn layout(n: usize) -> Layout {
        Layout::new(BTreeMap::from([("a".to_owned(), vec![n / 3]), ("b".to_owned(), vec![n - n / 3])]))
    }

    /// Of all elements, by kind.
    type Moments = BTreeMap<&'static str, Tensor>;

    /// What training leaves behind; moments come from the ranks that hold them.
    struct Run {
        params: Tensor,
        moments: Moments,
        norms: Vec<u64>,
    }

    /// The same as bits.
    #[derive(Clone, Debug, PartialEq)]
    struct Outcome {
        params: Vec<u32>,
        norms: Vec<u64>,
        moments: BTreeMap<&'static str, Vec<u32>>,
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        t.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    /// Steps `from..to` of a training in which slot s of step t has the gradient `random(10 t + s + 1)`, clipped to a norm of 1.
    fn train(
        tensors: &dyn Collectives,
        mut optimizer: Optimizer,
        n: usize,
        steps: std::ops::Range<usize>,
        start: Option<(Tensor, Moments)>,
    ) -> Result<Run, TrainError> {
        let (w, r) = (tensors.group().world_size(), tensors.group().rank());
        let mine = r * NUM_SLOTS / w..(r + 1) * NUM_SLOTS / w;
        let params = match start {
            None => random(0, n),
            Some((params, moments)) => {
                let own = optimizer.shard();
                let part = |flat: &Tensor| flat.narrow(0, own.start, own.len());
                let state = moments.iter().map(|(kind, flat)| Ok((*kind, part(flat)?))).collect::<Result<_, TrainError>>()?;
                optimizer.restore(&state, steps.start as u64)?;
                params.copy()?
            }
        };
        let part = if optimizer.shards().world_size() == w { Part::Shard(optimizer.shards()) } else { Part::Whole(n) };
        let gradient_sum = GradientSum::new(tensors, Reduction::SlotTree, NUM_SLOTS, part, &Device::Cpu);
        let mut norms = Vec::new();
        for step in steps {
            let mut sum = gradient_sum.begin(mine.clone())?;
            for slot in mine.clone() {
                sum.slot(slot, random(10 * step + slot + 1, n))?;
            }
            let grad = sum.finish()?;
            assert_eq!(optimizer.first_non_finite(&grad, &layout(n))?, None);
            let norm = optimizer.norm(&grad, Some(1.0))?;
            optimizer.step(&params, &grad, &norm, 1e-2)?;
            optimizer.gather(&params)?;
            norms.push(Norm::value(&norm.words().to_vec1::<f32>()?).to_bits());
        }
        let moments = optimizer.state(optimizer.shard())?.into_iter().collect();
        Ok(Run { params, moments, norms })
    }

    /// Of the parameters that [`train`] starts from.
    fn with_masters(optimizer: Optimizer, n: usize, has_masters: bool) -> Optimizer {
        if has_masters { optimizer.with_masters(&random(0, n)).unwrap() } else { optimizer }
    }

    /// One run of all ranks': the parts of moments one behind the other.
    fn whole(ranks: Vec<Run>) -> Run {
        let mut all = ranks.into_iter();
        let mut first = all.next().unwrap();
        for rank in all {
            for (kind, flat) in &mut first.moments {
                *flat = Tensor::cat(&[&*flat, &rank.moments[kind]], 0).unwrap();
            }
        }
        first
    }

    fn outcome(Run { params, moments, norms }: Run) -> Outcome {
        Outcome { params: bits(&params), norms, moments: moments.iter().map(|(kind, t)| (*kind, bits(t))).collect() }
    }

    #[test]
    fn sharded_steps_and_resumes_on_1_to_5_ranks_have_the_bits_of_an_unsharded_run() {
        sharded_as_unsharded(false);
    }

    #[test]
    fn sharded_steps_and_resumes_with_masters_on_1_to_5_ranks_have_the_bits_of_an_unsharded_run() {
        sharded_as_unsharded(true);
    }

    fn sharded_as_unsharded(has_masters: bool) {
        for n in [1, 100, optim::CHUNK, 3 * optim::CHUNK + 11, 6 * optim::CHUNK - 1] {
            let replicated = || with_masters(Optimizer::replicated(CONFIG, n, &Device::Cpu).unwrap(), n, has_masters);
            let expected = outcome(train(&Solo, replicated(), n, 0..4, None).unwrap());
            let is_rounded = |&bits: &u32| bits & 0xffff == 0;
            assert!(!has_masters || expected.params.iter().all(is_rounded) && !expected.moments["master"].iter().all(is_rounded));
            let half = train(&Solo, replicated(), n, 0..2, None).unwrap();
            let half = (half.params, half.moments);
            for world_size in 1..=5 {
                let on_all = |steps: std::ops::Range<usize>, start: Option<(Tensor, Moments)>| {
                    local::run(world_size, |g| {
                        let optimizer = with_masters(Optimizer::sharded(CONFIG, n, &Device::Cpu, g)?, n, has_masters);
                        train(g, optimizer, n, steps.clone(), start.clone())
                    })
                };
                let all: Vec<_> = on_all(0..4, None).into_iter().map(Result::unwrap).collect();
                assert!(all.iter().all(|o| bits(&o.params) == expected.params && o.norms == expected.norms), "{n} on {world_size} ranks");
                assert_eq!(outcome(whole(all)).moments, expected.moments, "{n} on {world_size} ranks");
                // On from what one rank has saved, and what this many save, goes on alone.
                let of_all = |runs: Vec<Result<Run, TrainError>>| whole(runs.into_iter().map(Result::unwrap).collect());
                let resumed = of_all(on_all(2..4, Some(half.clone())));
                assert_eq!(outcome(resumed).moments, expected.moments, "{n} resumed on {world_size} ranks");
                let saved = of_all(on_all(0..2, None));
                let alone = train(&Solo, replicated(), n, 2..4, Some((saved.params, saved.moments))).unwrap();
                assert_eq!(outcome(alone).params, expected.params, "{n} resumed from {world_size} ranks");
            }
        }
    }

    #[test]
    fn replicated_optimizer_among_ranks_has_the_same_bits_and_moves_nothing() {
        let n = optim::CHUNK + 5;
        let replicated = || Optimizer::replicated(CONFIG, n, &Device::Cpu).unwrap();
        let expected = outcome(train(&Solo, replicated(), n, 0..2, None).unwrap());
        for rank in local::run(3, |g| train(g, replicated(), n, 0..2, None)) {
            assert_eq!(outcome(rank.unwrap()), expected);
        }
    }

    #[test]
    fn first_non_finite_of_shards_is_that_of_the_whole_on_every_rank() {
        let n = 3 * optim::CHUNK + 9;
        for at in [Some(2 * optim::CHUNK + 7), Some(n - 1), Some(0), None] {
            let all = local::run(3, |g| {
                let optimizer = Optimizer::sharded(CONFIG, n, &Device::Cpu, g)?;
                let mut values = vec![1f32; n];
                at.iter().for_each(|&at| values[at] = f32::INFINITY);
                // A later one, which another rank finds.
                at.iter().for_each(|_| values[n - 1] = f32::NEG_INFINITY);
                let grad = Tensor::from_vec(values, n, &Device::Cpu)?;
                optimizer.first_non_finite(&optimizer.shard_of(&grad)?, &layout(n))
            });
            let value = if at == Some(n - 1) { f32::NEG_INFINITY } else { f32::INFINITY };
            let expected = at.map(|at| NonFinite::locate(at, value, &layout(n)).unwrap());
            all.into_iter().for_each(|found| assert_eq!(found.unwrap(), expected));
        }
    }
}
