//! The values of an adapter, from whatever program, as the start of a method's parameters.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use super::prefix::Names;
use super::thudm::ThudmFolder;
use super::{Base, MethodError, PeftMethod, prefix_tuning, ptuning_v2, read};

/// Puts the values of the adapter in `dir` into `method`: in PEFT's format, the adapters library's, or THUDM's. If `method` trains a prefix and the
/// folder has both formats of one, THUDM's is read.
///
/// # Errors
/// When `dir` holds no adapter, one of another base, or one whose sizes or parameters are not those of `method`.
pub fn import(dir: &Path, base: Base, method: &mut dyn PeftMethod) -> Result<(), MethodError> {
    let name = method.name();
    let wrong = |what: &str, found: String, expected: String| MethodError::NotImportable {
        path: dir.to_owned(),
        method: name,
        what: what.to_owned(),
        values: Box::new([found, expected]),
    };
    let takes_prefix = ENCODERS.iter().any(|names| method.params().layout().get(names.embedding).is_some());
    // PEFT's format of a prefix lacks the projection, which THUDM's has.
    let thudm = if takes_prefix { ThudmFolder::open(dir)? } else { None };
    let tensors = if let Some(folder) = thudm {
        read::read_thudm(&folder, dir, base)?.tensors
    } else {
        let adapter = read::read(dir, base)?;
        if !takes_prefix && adapter.name() != name {
            return Err(wrong("method", adapter.name().to_owned(), name.to_owned()));
        }
        if let (false, Some(what)) = (takes_prefix, first_difference(&adapter.sizes(), &method.sizes())) {
            let text = |sizes: &BTreeMap<String, Value>| sizes.get(&what).map_or("not there".to_owned(), Value::to_string);
            return Err(wrong(&what, text(&adapter.sizes()), text(&method.sizes())));
        }
        adapter.params().tensors()?
    };
    let tensors: BTreeMap<String, Tensor> =
        tensors.into_iter().map(|(name, tensor)| (called_by(method, &name).unwrap_or(name), tensor)).collect();
    let layout = method.params().layout();
    let names: BTreeSet<&str> = layout.iter().map(|(name, _)| name).chain(tensors.keys().map(String::as_str)).collect();
    for name in names {
        let found = tensors.get(name).map_or("not there".to_owned(), |tensor| format!("{:?}", tensor.dims()));
        let expected = layout.get(name).map_or("not there".to_owned(), |entry| format!("{:?}", entry.shape));
        if found != expected {
            return Err(wrong(name, found, expected));
        }
    }
    method.params_mut().load(&tensors)?;
    Ok(method.refresh()?)
}

/// What the methods that train a prefix call the parts of the same encoder.
const ENCODERS: [Names; 2] = [ptuning_v2::NAMES, prefix_tuning::NAMES];

/// What `method` calls a parameter of a prefix encoder.
fn called_by(method: &dyn PeftMethod, name: &str) -> Option<String> {
    let parts = |names: &Names| [names.embedding, names.first[0], names.first[1], names.second[0], names.second[1]];
    let layout = method.params().layout();
    let own = ENCODERS.iter().find(|names| layout.get(names.embedding).is_some())?;
    let part = ENCODERS.iter().find_map(|names| parts(names).iter().position(|part| *part == name))?;
    Some(parts(own)[part].to_owned())
}

/// A size that both have, or that only one has, and that is not the same; numbers are compared by value.
fn first_difference(adapter: &BTreeMap<String, Value>, method: &BTreeMap<String, Value>) -> Option<String> {
    let names: BTreeSet<&String> = adapter.keys().chain(method.keys()).collect();
    let is_same = |name: &String| match (adapter.get(name), method.get(name)) {
        (Some(a), Some(b)) => a == b || (a.is_number() && a.as_f64() == b.as_f64()),
        _ => false,
    };
    names.into_iter().find(|name| !is_same(name)).cloned()
}
