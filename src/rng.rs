//! A keyed counter random generator: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//!
//! A value is a pure function of (seed, stream, index, i): the same on every device, thread count and world size, and it needs
//! no state in a checkpoint. `stream` says what the numbers are for, `index` which object of that kind (a row, an epoch, a tensor).

/// What a sequence of numbers is for. The discriminants are part of the checkpoint format: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Initial values of trainable parameters; index = a hash of the parameter's name.
    ParameterInit = 1,
    /// Order of the training rows; index = epoch.
    Shuffle = 2,
    /// Dropout on the prefix; index = global position of the row in the training stream.
    PrefixDropout = 3,
    /// Weights of a model made by `init-model`; index = a hash of the tensor's name.
    ModelInit = 4,
    /// Rows made by `demo-data`; index = row.
    DemoData = 5,
    /// Dropout before a low-rank update; index = (global position of the row << 12) + layer * 4 + linear layer of the block.
    LowRankDropout = 6,
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * u64::from(MULTIPLIERS[0]);
        let b = u64::from(counter[2]) * u64::from(MULTIPLIERS[1]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// One sequence of random numbers; copying it is free and reading it changes nothing.
#[derive(Clone, Copy, Debug)]
pub struct KeyedRng {
    key: [u32; 2],
    stream: u32,
    index: u64,
}

impl KeyedRng {
    pub fn new(seed: u64, stream: Stream, index: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], stream: stream as u32, index }
    }

    /// Numbers `4 * block .. 4 * block + 4` of the sequence. A sequence has 2^34 numbers.
    pub fn block(&self, block: u32) -> [u32; 4] {
        philox4x32_10([block, self.stream, self.index as u32, (self.index >> 32) as u32], self.key)
    }

    /// Number `i` of the sequence.
    pub fn u32(&self, i: u64) -> u32 {
        self.block((i / 4) as u32)[(i % 4) as usize]
    }

    /// A float in [0, 1) with 24 random bits.
    pub fn uniform(&self, i: u64) -> f32 {
        unit(self.u32(i))
    }

    /// An integer below `bound`; `bound` must not be 0. The bias is below bound / 2^32.
    pub fn below(&self, i: u64, bound: u32) -> u32 {
        ((u64::from(self.u32(i)) * u64::from(bound)) >> 32) as u32
    }

    /// `n` values of N(0, 1) (Box-Muller, computed in f64 so that the result does not hang on a platform's f32 functions).
    pub fn normal(&self, n: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(n + 3);
        let mut block = 0;
        while out.len() < n {
            let r = self.block(block);
            for pair in r.chunks_exact(2) {
                let radius = (-2.0 * ((f64::from(pair[0]) + 0.5) / 4_294_967_296.0).ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * f64::from(pair[1]) / 4_294_967_296.0).sin_cos();
                out.extend([(radius * cos) as f32, (radius * sin) as f32]);
            }
            block += 1;
        }
        out.truncate(n);
        out
    }

    /// A permutation of `0..n` (Fisher-Yates).
    pub fn permutation(&self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i as u32 + 1) as usize);
        }
        order
    }
}

/// Maps 32 random bits to [0, 1) with 24 bits of precision.
pub fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 / 16_777_216.0
}

/// A stable 64-bit key for a name (FNV-1a), to index a stream by.
pub fn name_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers_of_random123_match() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn permutation_of_any_length_holds_each_index_once() {
        for n in [0, 1, 2, 17, 1000] {
            let mut p = KeyedRng::new(42, Stream::Shuffle, 3).permutation(n);
            p.sort_unstable();
            assert!(p.iter().enumerate().all(|(i, &x)| i == x as usize) && p.len() == n);
        }
    }

    #[test]
    fn sequences_of_other_streams_and_indices_differ() {
        let a = KeyedRng::new(1, Stream::Shuffle, 0).block(0);
        assert_ne!(a, KeyedRng::new(1, Stream::Shuffle, 1).block(0));
        assert_ne!(a, KeyedRng::new(1, Stream::DemoData, 0).block(0));
        assert_ne!(a, KeyedRng::new(2, Stream::Shuffle, 0).block(0));
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let x = KeyedRng::new(7, Stream::ParameterInit, 0).normal(100_001);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.01 && (var - 1.0).abs() < 0.02, "mean {mean}, variance {var}");
    }
}
