//! Greedy decoding with a key-value cache. The cache stands where a prefix stands: in front of a row's own tokens.

use candle_core::{Result, Tensor, bail};

use super::chatglm2::{ChatGlm2, Keep, Tokens};
use super::hooks::{Hooks, LinearSite, PrefixKv, Sublayer};
use super::linear::Linear;
use super::loss;
use crate::formats::text_of;
use crate::kernels::attention::Rows;
use crate::kernels::host::on_host;
use crate::kernels::ids::Ids;
use crate::kernels::non_finite::first_non_finite;
use crate::kernels::{cross_entropy, elementwise, embedding};

/// What greedy decoding gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    pub ids: Vec<u32>,
    /// How far each id's logit was above the second best.
    pub margins: Vec<f32>,
}

/// Continues `prompt` by at most `max_new_tokens` ids; `stop` ends it (and is part of the result).
///
/// # Errors
/// When the prompt is empty or holds an id that is not below the vocabulary, or a logit is NaN or infinite: no token is then the likeliest.
///
/// # Source
/// Positions go on from the number of real tokens, whatever the prefix's length (THUDM modeling_chatglm.py, stream_generate).
pub fn greedy(model: &ChatGlm2, hooks: &dyn Hooks, prompt: &[u32], max_new_tokens: usize, stop: Option<u32>) -> Result<Decoded> {
    if prompt.is_empty() {
        bail!("generate: the prompt is empty");
    }
    let layers = (0..model.config.num_layers).map(|layer| hooks.prefix_kv(layer)).collect::<Result<_>>()?;
    let mut cache = Cache { method: hooks, layers, has_soft_tokens: false };
    let num_soft = hooks.soft_tokens()?.map_or(Ok(0), |soft_PH| soft_PH.dim(0))? as u32;
    let mut decoded = Decoded { ids: Vec::new(), margins: Vec::new() };
    let mut input = prompt.to_vec();
    let mut position = 0;
    while decoded.ids.len() < max_new_tokens {
        let positions: Vec<u32> = (position..position + input.len() as u32).collect();
        let bounds = [0, input.len()];
        let tokens = Tokens { ids: &input, positions: &positions, rows: Rows { bounds: &bounds, keep: None, tables: None } };
        let (hidden_TH, tape) = model.forward(tokens, &cache, Keep::All)?;
        for (layer, qkv) in tape.qkv().enumerate() {
            if let Some(qkv) = qkv {
                cache.append(model, layer, qkv)?;
            }
        }
        let last = hidden_TH.narrow(0, input.len() - 1, 1)?.contiguous()?;
        let logits = loss::logits(model, &last)?;
        if let Some((id, value)) = first_non_finite(&logits)? {
            let done = decoded.ids.len();
            let value = text_of(value.into());
            bail!("after {done} tokens of the answer the logit of token id {id} is {value}: the weights are finite, so a sum overflowed");
        }
        let Some(&(id, margin)) = cross_entropy::top2(&on_host(&logits)?)?.first() else { bail!("generate: no logits") };
        decoded.ids.push(id);
        decoded.margins.push(margin);
        if stop == Some(id) {
            break;
        }
        // The soft tokens of the first pass moved its positions; in later passes they are cache.
        position += input.len() as u32 + if cache.has_soft_tokens { 0 } else { num_soft };
        cache.has_soft_tokens = true;
        input = vec![id];
    }
    Ok(decoded)
}

/// Keys and values of all tokens so far, behind the method's own prefix.
struct Cache<'a> {
    method: &'a dyn Hooks,
    layers: Vec<Option<PrefixKv>>,
    /// The method's soft tokens are in the cache already.
    has_soft_tokens: bool,
}

impl Cache<'_> {
    /// Keys and values of T more tokens, each group's behind those that are there.
    fn append(&mut self, model: &ChatGlm2, layer: usize, qkv_TN: &Tensor) -> Result<()> {
        let c = &model.config;
        let (n, g, d) = (c.num_attention_heads, c.multi_query_group_num, c.kv_channels);
        let (t, heads) = (qkv_TN.dim(0)?, n + 2 * g);
        // Of each group of keys, then of values, its tokens.
        let order = (0..2 * g).flat_map(|group| (0..t).map(move |token| (token * heads + n + group) as u32));
        let new = embedding::gather(&qkv_TN.reshape((t * heads, d))?, &Ids::new(order.collect::<Vec<_>>()))?;
        let (mut vectors, mut p) = (Vec::new(), 0);
        for group in 0..2 * g {
            if let Some(past) = &self.layers[layer] {
                let past_GPD = if group < g { &past.k_RGPD } else { &past.v_RGPD };
                p = past_GPD.dim(2)?;
                vectors.push(past_GPD.reshape((g * p, d))?.narrow(0, group % g * p, p)?);
            }
            vectors.push(new.narrow(0, group * t, t)?);
        }
        let both = elementwise::cat(&vectors)?;
        let part = |which: usize| both.narrow(0, which * g * (p + t), g * (p + t))?.reshape((1, g, p + t, d));
        self.layers[layer] = Some(PrefixKv { k_RGPD: part(0)?, v_RGPD: part(1)? });
        Ok(())
    }
}

impl Hooks for Cache<'_> {
    fn prefix_kv(&self, layer: usize) -> Result<Option<PrefixKv>> {
        Ok(self.layers[layer].clone())
    }

    fn soft_tokens(&self) -> Result<Option<Tensor>> {
        if self.has_soft_tokens { Ok(None) } else { self.method.soft_tokens() }
    }

    fn linear(&self, layer: usize, site: LinearSite, base: &Linear, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        self.method.linear(layer, site, base, x)
    }

    fn sublayer(&self, layer: usize, which: Sublayer, x: &Tensor, y: &Tensor) -> Result<Option<Tensor>> {
        self.method.sublayer(layer, which, x, y)
    }
}
