//! Each op against the same formula composed of candle ops whose gradients candle's autograd takes, at odd sizes, and against finite differences.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use glmddp::kernels::activation::{self, Activation};
use glmddp::kernels::attention::{self, Heads, Prefix, Rows, Wanted};
use glmddp::kernels::cross_entropy::{self, Logits};
use glmddp::kernels::lstm::{self, Order};
use glmddp::kernels::rotary::{self, Angles, Direction, Precision, Table};
use glmddp::kernels::{elementwise, kl, matmul, rms_norm, swiglu};
use glmddp::rng::{KeyedRng, Stream};

use crate::not_run::{Missing, not_run};

const RELATIVE: f64 = 2e-5;

fn random(shape: &[usize], key: u64) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_vec(KeyedRng::new(11, Stream::DemoData, key).normal(n), shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, relative to the largest value.
#[track_caller]
fn assert_close(ours: &Tensor, reference: &Tensor, what: &str) {
    assert_eq!(ours.dims(), reference.dims(), "{what}");
    let (a, b) = (values(ours), values(reference));
    let scale = b.iter().fold(1e-6f64, |m, x| m.max(f64::from(x.abs())));
    let worst = a.iter().zip(&b).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max) / scale;
    assert!(worst < RELATIVE && a.iter().all(|x| x.is_finite()), "{what}: off by {worst:.2e} of the largest value");
}

/// d sum(g * f(inputs)) / d inputs by candle's autograd.
fn vjp(inputs: &[&Tensor], g: &Tensor, f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let grads = (y * g).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|v| grads.get(v).unwrap().clone()).collect()
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

#[test]
fn matmul_in_all_three_forms_equals_candle_at_odd_sizes() {
    for (m, k, n) in [(1, 1, 1), (1, 33, 31), (31, 64, 1), (33, 129, 65), (64, 512, 48)] {
        let (x, w, dy) = (random(&[m, k], 1), random(&[n, k], 2), random(&[m, n], 3));
        assert_close(&matmul::nt(&x, &w).unwrap(), &x.matmul(&w.t().unwrap()).unwrap(), "nt");
        assert_close(&matmul::nn(&dy, &w).unwrap(), &dy.matmul(&w).unwrap(), "nn");
        assert_close(&matmul::tn(&dy, &x).unwrap(), &dy.t().unwrap().matmul(&x).unwrap(), "tn");
    }
}

#[test]
fn matmul_row_does_not_depend_on_the_other_rows() {
    let (x, w) = (random(&[130, 512], 1), random(&[768, 512], 2));
    let all = matmul::nt(&x, &w).unwrap();
    for (start, len) in [(0, 65), (65, 65), (3, 17), (100, 30)] {
        let part = matmul::nt(&x.narrow(0, start, len).unwrap().contiguous().unwrap(), &w).unwrap();
        assert_eq!(values(&part), values(&all.narrow(0, start, len).unwrap()), "rows {start}..{}", start + len);
    }
}

/// What every element of a product is, whatever the sizes, strides, tiles and threads: chains of fused multiply-adds over at most 512 steps of k
/// that are equally long but for the last, added up in order.
fn by_definition(x: &Tensor, w: &Tensor, start: Option<&Tensor>) -> Vec<u32> {
    let ((m, k), (n, _)) = (x.dims2().unwrap(), w.dims2().unwrap());
    let (x, w, start) = (values(x), values(w), start.map(values));
    let chain = k.div_ceil(k.div_ceil(512));
    let element = |at: usize| {
        let (row, column) = (&x[at / n * k..][..k], &w[at % n * k..][..k]);
        let chains = row.chunks(chain).zip(column.chunks(chain));
        let sums = chains.map(|(a, b)| a.iter().zip(b).fold(0f32, |sum, (a, b)| a.mul_add(*b, sum)));
        start.iter().map(|start| start[at]).chain(sums).reduce(|a, b| a + b).unwrap().to_bits()
    };
    (0..m * n).map(element).collect()
}

#[test]
fn matmul_of_any_size_and_strides_is_the_same_chain_of_multiply_adds() {
    if cfg!(target_arch = "x86_64") && !std::arch::is_x86_feature_detected!("fma") {
        not_run(Missing::Fma, "this processor does not fuse multiply-adds, and the test needs it");
        return;
    }
    let bits = |t: &Tensor| values(t).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let tall = (1..28).map(|m| (m, 33, 800));
    let wide = [(5, 7, 1), (12, 1, 32), (13, 513, 40), (97, 5, 95), (64, 520, 96), (200, 9, 129), (70, 30, 768), (25, 1030, 771)];
    for (m, k, n) in tall.chain(wide) {
        let (x, w, sum) = (random(&[m, k], 1), random(&[n, k], 2), random(&[m, n], 3));
        let t = |t: &Tensor| t.t().unwrap().contiguous().unwrap();
        let expected = by_definition(&x, &w, None);
        assert!(bits(&matmul::nt(&x, &w).unwrap()) == expected, "nt of {m} x {k} x {n}");
        assert!(bits(&matmul::nn(&x, &t(&w)).unwrap()) == expected, "nn of {m} x {k} x {n}");
        assert!(bits(&matmul::tn(&t(&x), &t(&w)).unwrap()) == expected, "tn of {m} x {k} x {n}");
        let expected = by_definition(&x, &w, Some(&sum));
        matmul::tn_add_(&sum, &t(&x), &t(&w)).unwrap();
        assert!(bits(&sum) == expected, "tn_add_ of {m} x {k} x {n}");
    }
}

#[test]
fn matmul_of_other_inner_sizes_is_refused() {
    assert!(matmul::nt(&random(&[2, 3], 1), &random(&[2, 4], 2)).unwrap_err().to_string().contains("inner sizes differ"));
}

#[test]
fn rms_norm_and_its_gradient_equal_autograd() {
    for (t, h) in [(1, 1), (1, 16), (7, 33), (31, 96)] {
        let (x, w, dy, residual) = (random(&[t, h], 1), random(&[h], 2), random(&[t, h], 3), random(&[t, h], 4));
        let composed = |t: &[Tensor]| {
            let x = &t[0];
            let rstd = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.recip()?.sqrt()?;
            x.broadcast_mul(&rstd)?.broadcast_mul(&w)
        };
        let (y, rstd) = rms_norm::fwd(&x, &w, 1e-5).unwrap();
        assert_close(&y, &composed(std::slice::from_ref(&x)).unwrap(), "rms_norm");
        let dx = residual.copy().unwrap();
        rms_norm::bwd_add_(&dx, &dy, &x, &rstd, &w).unwrap();
        assert_close(&dx, &(&residual + &vjp(&[&x], &dy, composed)[0]).unwrap(), "rms_norm dx");
    }
}

#[test]
fn swiglu_and_its_gradient_equal_autograd() {
    for (t, f) in [(1, 1), (5, 31), (9, 130)] {
        let (x, d) = ((random(&[t, 2 * f], 1) * 3.0).unwrap(), random(&[t, f], 2));
        let composed = |t: &[Tensor]| t[0].narrow(1, 0, f)?.silu()? * t[0].narrow(1, f, f)?;
        assert_close(&swiglu::fwd(&x).unwrap(), &composed(std::slice::from_ref(&x)).unwrap(), "swiglu");
        assert_close(&swiglu::bwd(x.clone(), &d).unwrap(), &vjp(&[&x], &d, composed)[0], "swiglu dx");
    }
}

#[test]
fn activations_and_their_gradients_equal_autograd() {
    for shape in [[1, 1], [5, 31], [9, 1000]] {
        let (x, d) = ((random(&shape, 1) * 3.0).unwrap(), random(&shape, 2));
        for (activation, composed) in [(Activation::Silu, Tensor::silu as fn(&Tensor) -> Result<Tensor>), (Activation::Relu, Tensor::relu)]
        {
            assert_close(&activation::fwd(activation, &x).unwrap(), &composed(&x).unwrap(), &format!("{activation:?}"));
            let dx = vjp(&[&x], &d, |t| composed(&t[0]));
            assert_close(&activation::bwd(activation, &x, &d).unwrap(), &dx[0], &format!("{activation:?} dx"));
        }
    }
    let zero = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let at_zero = activation::bwd(Activation::Relu, &zero, &zero.ones_like().unwrap()).unwrap();
    assert_eq!(values(&at_zero), [0.0; 3], "as PyTorch has it");
}

#[test]
fn cross_entropy_and_its_gradient_equal_autograd() {
    for (n, v) in [(1, 2), (3, 33), (17, 500)] {
        let logits = (random(&[n, v], 1) * 5.0).unwrap();
        let targets: Vec<u32> = (0..n).map(|i| (i * 7 % v) as u32).collect();
        let index = Tensor::new(targets.clone(), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let composed = |t: &[Tensor]| {
            let shifted = t[0].broadcast_sub(&t[0].max_keepdim(1)?.detach())?;
            shifted.exp()?.sum_keepdim(1)?.log()? - shifted.gather(&index, 1)?
        };
        let reference = composed(std::slice::from_ref(&logits)).unwrap();
        let dlogits = vjp(&[&logits], &Tensor::ones((n, 1), DType::F32, &Device::Cpu).unwrap(), composed);
        let ours = logits.copy().unwrap();
        let losses = cross_entropy::nll_(&ours, &targets, Logits::ToGradient).unwrap().to_vec1::<f32>().unwrap();
        assert_close(&Tensor::from_vec(losses.clone(), (n, 1), &Device::Cpu).unwrap(), &reference, "nll");
        assert_close(&ours, &dlogits[0], "dlogits");
        let discarded = cross_entropy::nll_(&logits.copy().unwrap(), &targets, Logits::Discard).unwrap();
        assert_eq!(discarded.to_vec1::<f32>().unwrap(), losses);
    }
}

#[test]
fn cross_entropy_of_nan_or_infinite_logits_is_not_finite() {
    for bad in [f32::NAN, f32::INFINITY] {
        let logits = Tensor::from_vec(vec![0.1, bad, 0.3], (1, 3), &Device::Cpu).unwrap();
        assert!(!cross_entropy::nll_(&logits, &[0], Logits::ToGradient).unwrap().to_vec1::<f32>().unwrap()[0].is_finite());
    }
}

#[test]
fn cross_entropy_target_outside_the_vocabulary_is_refused() {
    let text = cross_entropy::nll_(&random(&[1, 4], 1), &[4], Logits::Discard).unwrap_err().to_string();
    assert!(text.contains("target 4 is not below the vocabulary of 4"), "{text}");
}

#[test]
fn rotary_turns_pairs_of_the_first_half_and_inverse_undoes_it() {
    let angles = Angles { base: 10_000.0, position_divisor: 1.0, precision: Precision::Exact };
    let (d, heads) = (8, 3);
    let table = Table::new(&[0, 5, 1000], d, angles);
    let x = random(&[3, heads * d + 4], 1);
    let y = x.copy().unwrap();
    rotary::rotate_(&y, &table, heads, d, Direction::Forward).unwrap();
    let (a, b) = (values(&x), values(&y));
    let width = heads * d + 4;
    assert_eq!(a[..width], b[..width], "position 0 turns nothing");
    for (t, position) in [(1, 5f64), (2, 1000.0)] {
        for head in 0..heads {
            let at = t * width + head * d;
            for i in 0..d / 4 {
                let (sin, cos) = (position * 10_000f64.powf(-2.0 * i as f64 / (d / 2) as f64)).sin_cos();
                let (u, v) = (f64::from(a[at + 2 * i]), f64::from(a[at + 2 * i + 1]));
                assert!((f64::from(b[at + 2 * i]) - (u * cos - v * sin)).abs() < 1e-6);
                assert!((f64::from(b[at + 2 * i + 1]) - (v * cos + u * sin)).abs() < 1e-6);
            }
            assert_eq!(a[at + d / 2..at + d], b[at + d / 2..at + d], "the second half stays");
        }
        assert_eq!(a[t * width + heads * d..(t + 1) * width], b[t * width + heads * d..(t + 1) * width], "what is no head stays");
    }
    rotary::rotate_(&y, &table, heads, d, Direction::Inverse).unwrap();
    assert_close(&y, &x, "inverse");
}

/// Attention of one row composed of candle ops; q, k, v, pk, pv.
fn composed_attention(t: &[Tensor], heads: Heads, keep: Option<&[bool]>, has_prefix: bool) -> Result<Tensor> {
    let (qkv, n, g, d) = (&t[0], heads.num_heads, heads.num_groups, heads.head_dim);
    let len = qkv.dim(0)?;
    let part = |first: usize, count: usize| qkv.narrow(1, first * d, count * d)?.reshape((len, count, d))?.transpose(0, 1)?.contiguous();
    let (q, mut k, mut v) = (part(0, n)?, part(n, g)?, part(n + g, g)?);
    let mut p = 0;
    if has_prefix {
        p = t[1].dim(1)?;
        k = Tensor::cat(&[&t[1], &k], 1)?;
        v = Tensor::cat(&[&t[2], &v], 1)?;
    }
    let expand = |x: Tensor| x.unsqueeze(1)?.repeat((1, n / g, 1, 1))?.reshape((n, p + len, d));
    let (k, v) = (expand(k)?, expand(v)?);
    let mask: Vec<f32> = (0..len)
        .flat_map(|i| {
            (0..p + len).map(move |j| {
                let everything = !has_prefix && keep.is_some_and(|keep| !keep[i]);
                let sees = j < p || everything || (j - p <= i && keep.is_none_or(|keep| keep[j - p]));
                if sees { 0.0 } else { -1e30 }
            })
        })
        .collect();
    let mask = Tensor::from_vec(mask, (1, len, p + len), &Device::Cpu)?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? / (d as f64).sqrt())?.broadcast_add(&mask)?;
    softmax(&scores)?.matmul(&v)?.transpose(0, 1)?.reshape((len, n * d))
}

fn attention_case(lens: &[usize], heads: Heads, prefix_len: usize, shared: bool, padding: bool) {
    let total: usize = lens.iter().sum();
    let bounds: Vec<usize> = std::iter::once(0)
        .chain(lens.iter().scan(0, |at, n| {
            Some({
                *at += n;
                *at
            })
        }))
        .collect();
    let (n, g, d) = (heads.num_heads, heads.num_groups, heads.head_dim);
    let qkv = random(&[total, heads.qkv_width()], 1);
    let rows = if shared { 1 } else { lens.len() };
    let prefix = (prefix_len > 0).then(|| (random(&[rows, g, prefix_len, d], 2), random(&[rows, g, prefix_len, d], 3)));
    let keep: Option<Vec<bool>> = padding.then(|| (0..total).map(|i| (i * 7 + 3) % 5 != 0).collect());
    let rows_arg = Rows { bounds: &bounds, keep: keep.as_deref(), tables: None };
    let as_prefix = prefix.as_ref().map(|(k, v)| Prefix { k_RGPD: k, v_RGPD: v });
    let (out, lse) = attention::fwd(&qkv, as_prefix, rows_arg, heads).unwrap();
    let dout = random(&[total, n * d], 4);
    let grads = attention::bwd(&dout, &qkv, as_prefix, &out, &lse, rows_arg, heads, Wanted::All).unwrap();
    let only = attention::bwd(&dout, &qkv, as_prefix, &out, &lse, rows_arg, heads, Wanted::PrefixOnly).unwrap();
    assert!(only.dqkv.is_none());
    for (r, b) in bounds.windows(2).enumerate() {
        let (start, len) = (b[0], b[1] - b[0]);
        if len == 0 {
            continue;
        }
        let what = format!("row {r} of {lens:?}, {heads:?}, prefix {prefix_len}, shared {shared}, padding {padding}");
        let keep = keep.as_ref().map(|keep| &keep[b[0]..b[1]]);
        let mut inputs = vec![qkv.narrow(0, start, len).unwrap().contiguous().unwrap()];
        if let Some((k, v)) = &prefix {
            let r = if shared { 0 } else { r };
            inputs.extend([k.get(r).unwrap().contiguous().unwrap(), v.get(r).unwrap().contiguous().unwrap()]);
        }
        let f = |t: &[Tensor]| composed_attention(t, heads, keep, prefix.is_some());
        assert_close(&out.narrow(0, start, len).unwrap(), &f(&inputs).unwrap(), &what);
        let reference = vjp(&inputs.iter().collect::<Vec<_>>(), &dout.narrow(0, start, len).unwrap().contiguous().unwrap(), f);
        assert_close(&grads.dqkv.as_ref().unwrap().narrow(0, start, len).unwrap(), &reference[0], &what);
        if prefix.is_some() {
            for grads in [&grads, &only] {
                let (dk, dv) = grads.dprefix.as_ref().unwrap();
                assert_close(&dk.get(r).unwrap(), &reference[1], &what);
                assert_close(&dv.get(r).unwrap(), &reference[2], &what);
            }
        }
    }
}

#[test]
fn attention_and_its_gradients_equal_autograd_at_odd_sizes() {
    let heads = |num_heads, num_groups, head_dim| Heads { num_heads, num_groups, head_dim };
    for padding in [false, true] {
        attention_case(&[1], heads(1, 1, 4), 0, true, padding);
        attention_case(&[33, 1, 64, 31], heads(4, 2, 16), 7, false, padding);
        attention_case(&[33, 0, 31], heads(6, 3, 8), 1, true, padding);
        attention_case(&[70, 5], heads(4, 1, 12), 0, true, padding);
    }
}

#[test]
fn attention_flops_stay_close_to_those_of_the_visible_pairs() {
    let heads = Heads { num_heads: 8, num_groups: 2, head_dim: 64 };
    let bounds = [0, 130, 200];
    let qkv = random(&[200, heads.qkv_width()], 1);
    let (k, v) = (random(&[1, 2, 128, 64], 2), random(&[1, 2, 128, 64], 3));
    let before = matmul::flops();
    attention::fwd(&qkv, Some(Prefix { k_RGPD: &k, v_RGPD: &v }), Rows { bounds: &bounds, keep: None, tables: None }, heads).unwrap();
    // Two products for every visible (query, key) pair.
    let pairs: usize = bounds.windows(2).map(|b| b[1] - b[0]).map(|n| n * 128 + n * (n + 1) / 2).sum();
    let ratio = (matmul::flops() - before) as f64 / (4 * pairs * heads.num_heads * heads.head_dim) as f64;
    assert!((1.0..1.12).contains(&ratio), "{ratio}");
}

#[test]
fn attention_gradient_equals_finite_differences() {
    let heads = Heads { num_heads: 2, num_groups: 1, head_dim: 4 };
    let (bounds, rows) = ([0, 3, 5], 2);
    let (qkv, k, v) = (random(&[5, heads.qkv_width()], 1), random(&[rows, 1, 2, 4], 2), random(&[rows, 1, 2, 4], 3));
    let g = random(&[5, 8], 4);
    let rows_arg = Rows { bounds: &bounds, keep: None, tables: None };
    let f = |qkv: &Tensor, k: &Tensor, v: &Tensor| {
        let (out, _) = attention::fwd(qkv, Some(Prefix { k_RGPD: k, v_RGPD: v }), rows_arg, heads).unwrap();
        values(&(out * &g).unwrap()).iter().map(|&x| f64::from(x)).sum::<f64>()
    };
    let (out, lse) = attention::fwd(&qkv, Some(Prefix { k_RGPD: &k, v_RGPD: &v }), rows_arg, heads).unwrap();
    let grads = attention::bwd(&g, &qkv, Some(Prefix { k_RGPD: &k, v_RGPD: &v }), &out, &lse, rows_arg, heads, Wanted::All).unwrap();
    let (dk, dv) = grads.dprefix.unwrap();
    let nudge = |t: &Tensor, i: usize, by: f32| {
        let mut x = values(t);
        x[i] += by;
        Tensor::from_vec(x, t.dims(), &Device::Cpu).unwrap()
    };
    let step = 1e-2;
    for (which, (input, grad)) in [(&qkv, grads.dqkv.unwrap()), (&k, dk), (&v, dv)].into_iter().enumerate() {
        for (i, &analytic) in values(&grad).iter().enumerate() {
            let at = |by: f32| {
                let moved = nudge(input, i, by);
                match which {
                    0 => f(&moved, &k, &v),
                    1 => f(&qkv, &moved, &v),
                    _ => f(&qkv, &k, &moved),
                }
            };
            let numeric = (at(step) - at(-step)) / (2.0 * f64::from(step));
            assert!((numeric - f64::from(analytic)).abs() < 2e-3, "input {which}, element {i}: {numeric} against {analytic}");
        }
    }
}

/// One direction of an LSTM layer of x, w_ih, w_hh, b_ih, b_hh in composed ops.
fn composed_lstm(t: &[Tensor], order: Order) -> Result<Tensor> {
    let [x, w_ih, w_hh, b_ih, b_hh] = t else { unreachable!() };
    let (steps, e) = (x.dim(0)?, w_hh.dim(1)?);
    let sigmoid = |x: &Tensor| (x.neg()?.exp()? + 1.0)?.recip();
    let mut rows: Vec<usize> = (0..steps).collect();
    if order == Order::Reverse {
        rows.reverse();
    }
    let (mut h, mut c) = (Tensor::zeros((1, e), DType::F32, &Device::Cpu)?, Tensor::zeros((1, e), DType::F32, &Device::Cpu)?);
    let mut out = vec![h.clone(); steps];
    for row in rows {
        let gates = x.narrow(0, row, 1)?.matmul(&w_ih.t()?)?.broadcast_add(b_ih)?;
        let gates = (gates + h.matmul(&w_hh.t()?)?.broadcast_add(b_hh)?)?;
        let gate = |n: usize| gates.narrow(1, n * e, e);
        c = ((sigmoid(&gate(1)?)? * c)? + (sigmoid(&gate(0)?)? * gate(2)?.tanh()?)?)?;
        h = (sigmoid(&gate(3)?)? * c.tanh()?)?;
        out[row] = h.clone();
    }
    Tensor::cat(&out, 0)
}

#[test]
fn lstm_and_its_gradient_equal_autograd_at_odd_sizes_on_any_number_of_threads() {
    for (t, n, e) in [(1, 3, 2), (7, 33, 31), (5, 4, 130), (20, 16, 1)] {
        let scaled = |shape: &[usize], key| (random(shape, key) * (1.0 / (e as f64).sqrt())).unwrap();
        let (x, g) = (random(&[t, n], 1), random(&[t, e], 2));
        let (w_ih, w_hh, b_ih, b_hh) = (scaled(&[4 * e, n], 3), scaled(&[4 * e, e], 4), scaled(&[4 * e], 5), scaled(&[4 * e], 6));
        let weights = lstm::Weights { w_ih: w_ih.clone(), w_hh: w_hh.clone(), b_ih: b_ih.clone(), b_hh: b_hh.clone() };
        for order in [Order::Forward, Order::Reverse] {
            let inputs = [&x, &w_ih, &w_hh, &b_ih, &b_hh];
            let run = || {
                let saved = lstm::fwd(&x, &weights, order).unwrap();
                let grads = lstm::bwd(&g, &x, &saved, &weights, order).unwrap();
                [saved.output_TE, grads.x_TN, grads.w_ih, grads.w_hh, grads.bias.clone(), grads.bias]
            };
            let ours = run();
            let composed = composed_lstm(&inputs.map(Clone::clone), order).unwrap();
            let expected = vjp(&inputs, &g, |t| composed_lstm(t, order));
            for (i, (ours, expected)) in ours.iter().zip([vec![composed], expected].concat()).enumerate() {
                assert_close(ours, &expected, &format!("{t} steps, {n} to {e}, {order:?}, tensor {i}"));
            }
            let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(run);
            let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap().install(run);
            assert!(one.iter().zip(&three).all(|(a, b)| values(a) == values(b)), "threads change a bit");
        }
    }
}

#[test]
fn lstm_of_other_sizes_is_refused() {
    let weights = lstm::Weights { w_ih: random(&[8, 3], 1), w_hh: random(&[8, 2], 2), b_ih: random(&[8], 3), b_hh: random(&[8], 4) };
    let text = lstm::fwd(&random(&[5, 4], 5), &weights, Order::Forward).unwrap_err().to_string();
    assert!(text.contains("x [5, 4]") && text.contains("w_ih [8, 3]"), "{text}");
}

#[test]
fn additions_in_place_change_every_view() {
    let x = random(&[4, 6], 1);
    let view = x.clone();
    let before = values(&x);
    elementwise::add_(&x, &Tensor::ones((4, 6), DType::F32, &Device::Cpu).unwrap()).unwrap();
    elementwise::scale_(&x, 2.0).unwrap();
    elementwise::add_bias_(&x, &Tensor::full(0.5f32, 6, &Device::Cpu).unwrap()).unwrap();
    assert!(values(&view).iter().zip(before).all(|(a, b)| (a - ((b + 1.0) * 2.0 + 0.5)).abs() < 1e-6));
}

/// Sum of p (log p - log q) in f64, log-softmax by log-softmax.
fn naive_kl(a: &[f32], b: &[f32]) -> f64 {
    let log_softmax = |x: &[f32]| -> Vec<f64> {
        let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
        x.iter().map(|&x| f64::from(x) - sum.ln()).collect()
    };
    log_softmax(a).iter().zip(log_softmax(b)).map(|(p, q)| p.exp() * (p - q)).sum()
}

#[test]
fn kl_at_odd_sizes_equals_the_naive_sum_and_is_zero_for_equal_logits() {
    for (n, v) in [(1, 1), (1, 31), (33, 33), (5, 1000)] {
        let (a, b) = (random(&[n, v], 1), random(&[n, v], 2));
        let ours = kl::rows(&a, &b).unwrap();
        for (i, kl) in ours.iter().enumerate() {
            let row = |t: &Tensor| values(&t.get(i).unwrap());
            let naive = naive_kl(&row(&a), &row(&b));
            assert!((kl - naive).abs() < 1e-12, "row {i} of [{n}, {v}]: {kl}, expected {naive}");
            assert!(*kl >= 0.0 && (v == 1 || *kl > 1e-3));
        }
        assert_eq!(kl::rows(&a, &a).unwrap(), vec![0.0; n]);
        // A shift of all logits changes no probability.
        let shifted = kl::rows(&a, &(&a + 64.0).unwrap()).unwrap();
        assert!(shifted.iter().all(|kl| *kl < 1e-5), "{shifted:?}");
    }
}

#[test]
fn kl_of_extreme_and_non_finite_logits_is_right_or_says_so() {
    let logits = |x: [f32; 3]| Tensor::new(&[x], &Device::Cpu).unwrap();
    let kl = |a, b| kl::rows(&logits(a), &logits(b)).unwrap()[0];
    assert!((kl([0.0, -1e4, -1e4], [0.0, 0.0, -1e4]) - 2f64.ln()).abs() < 1e-12);
    assert!((kl([1e4, 0.0, 0.0], [0.0, 1e4, 0.0]) - 1e4).abs() < 1e-8);
    assert!(kl([f32::NAN, 0.0, 0.0], [0.0; 3]).is_nan() && kl([0.0; 3], [0.0, f32::INFINITY, 0.0]).is_nan());
    assert!(kl::rows(&random(&[2, 3], 1), &random(&[2, 4], 1)).is_err());
}
