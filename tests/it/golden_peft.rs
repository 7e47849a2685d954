//! Every folder `peft_NAME` of every golden case, as PEFT saved it: read the way `evaluate` reads an adapter, it gives the logits and losses of the
//! golden file that it was made from; written again, it is the same adapter, and no key says otherwise than PEFT's.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use glmddp::model::{ChatGlm2, Recompute};
use glmddp::peft::{Base, ExportContext, PeftMethod, read};
use serde_json::Value;

use crate::golden::{Case, cases};
use crate::golden_batch::{Batch, check_variant, eval_hooks};
use crate::golden_methods::not_there;
use crate::golden_model::model;

/// Folders of a case that PEFT saved -> NAME.
fn folders(case: &Case) -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(&case.dir).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: PathBuf| Some((path.clone(), path.file_name()?.to_str()?.strip_prefix("peft_")?.to_owned()));
    let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).filter_map(named).collect();
    folders.sort();
    folders
}

/// The file with the logits of folder `peft_NAME`: NAME, or where a file of that name is of a fresh adapter and one of a random one, the latter.
fn golden_file(case: &Case, name: &str) -> String {
    let candidates = match name {
        "prefix_tuning" => vec!["ptuning".to_owned()], // the plain prefix is THUDM's and PEFT's alike
        name => vec![name.to_owned(), format!("{name}_random")],
    };
    let found = candidates.iter().find(|file| case.dir.join(format!("{file}.safetensors")).exists());
    found.unwrap_or_else(|| panic!("{}: folder peft_{name} belongs to no golden file; tried {candidates:?}", case.dir.display())).clone()
}

/// An adapter without fingerprints, as PEFT writes it.
fn read_back(dir: &Path, model: &ChatGlm2) -> Box<dyn PeftMethod> {
    read(dir, Base { model, fingerprint: "of none", tokenizer_sha256: "of none" }).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

fn bits(method: &dyn PeftMethod) -> Vec<(String, Vec<u32>)> {
    let tensors = method.params().tensors().unwrap().into_iter();
    let of = |t: candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    tensors.map(|(name, tensor)| (name, of(tensor))).collect()
}

/// Keys of ours that PEFT's file does not have, or with another value. Numbers count by value and lists without their order: PEFT's are sets.
fn other_keys(ours: &Path, theirs: &Path) -> BTreeSet<String> {
    let read = |dir: &Path| serde_json::from_slice::<Value>(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
    let (ours, theirs) = (read(ours), read(theirs));
    let same = |a: &Value, b: &Value| match (a, b) {
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().all(|x| b.contains(x)),
        _ => a == b || (a.is_number() && a.as_f64() == b.as_f64()),
    };
    // Where the base is, and the class that the goldens' LoRA was made on.
    let free = ["base_model_name_or_path", "auto_mapping"];
    let keys = ours.as_object().unwrap().iter().filter(|(key, _)| !free.contains(&key.as_str()));
    keys.filter(|(key, value)| theirs.get(key).is_none_or(|their| !same(value, their))).map(|(key, _)| key.clone()).collect()
}

/// Those that are others after reading and writing: of an encoder PEFT keeps the output alone, so what is read is a plain table.
fn keys_of_the_encoder(name: &str) -> &'static [&'static str] {
    match name {
        "prefix_tuning_proj" => &["encoder_hidden_size", "prefix_projection"],
        "p_tuning_lstm" | "p_tuning_mlp" => {
            &["peft_type", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"]
        }
        _ => &[],
    }
}

#[test]
fn golden_peft_folders_give_the_logits_of_their_golden_files_and_are_written_the_same() {
    for case in cases() {
        let folders = folders(&case);
        if folders.is_empty() {
            not_there(&case, "peft_*");
            continue;
        }
        let (model, inputs) = (model(&case), case.tensors("inputs").unwrap());
        for (dir, name) in &folders {
            let method = read_back(dir, &model);
            let mut c = case.compare(&golden_file(&case, name)).unwrap();
            // No name of a gradient: a table that is read has no encoder behind it, and its parameters are others than the file's.
            let (batch, no_gradient) = (Batch::new(&inputs, "plain"), |_: &str| String::new());
            check_variant(&mut c, &model, Some((&*method, eval_hooks(&*method))), &batch, "plain", Recompute::None, &no_gradient);
            c.finish();

            let again = tempfile::tempdir().unwrap();
            let context =
                ExportContext { model_dir: &case.dir.join("hf"), config: &model.config, dtype: None, about: &serde_json::json!({}) };
            for (file, bytes) in method.export(&context).unwrap().into_iter().filter(|(file, _)| file != "glmddp.json") {
                std::fs::write(again.path().join(file), bytes).unwrap();
            }
            let reread = read_back(again.path(), &model);
            assert_eq!((reread.name(), reread.sizes()), (method.name(), method.sizes()), "{}: written and read again", dir.display());
            assert!(bits(&*reread) == bits(&*method), "{}: written and read again, other values", dir.display());
            let expected = keys_of_the_encoder(name).iter().map(|key| (*key).to_owned()).collect();
            assert_eq!(other_keys(again.path(), dir), expected, "{}: keys that are not PEFT's", dir.display());
        }
        let names: BTreeSet<&str> = folders.iter().map(|(_, name)| name.as_str()).collect();
        println!("golden {:<12} read, written and read again: {names:?}", case.name());
    }
}
