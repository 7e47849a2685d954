//! What once broke a promise: each input, and what is said of it now.

use glmddp::config::{self, RunConfig};
use glmddp::peft::FinetuningType;
use glmddp::peft::keys::MethodKeys;

use crate::formats::{opened, unpickled};
use crate::harness::read_one;
use crate::texts::configured;
use crate::{archive, models};

#[test]
fn tensors_under_one_long_name_cost_the_name_once() {
    unpickled(&archive::repeated_name(100_000, 100_000)).unwrap();
}

#[test]
fn archive_with_two_pickles_is_refused_by_both_names() {
    let pickle = archive::dict_of(&archive::tensor(16, 0, &[4], &[1]));
    let two = archive::zip_of([("a/data.pkl", &pickle[..]), ("b/data.pkl", &pickle[..]), ("a/data/0", &[0; 64]), ("b/data/0", &[1; 64])]);
    let error = opened(two).unwrap_err();
    assert!(error.contains("`a/data.pkl` and `b/data.pkl`"), "{error}");
}

#[test]
fn adapter_of_a_rank_that_its_file_has_not_is_refused_by_its_tensor() {
    let lora = models::exported(MethodKeys { lora_rank: Some(2), ..models::keys(FinetuningType::Lora) });
    for rank in [1_000_000_000, u64::MAX] {
        let error = read_one(&models::adapter(Vec::new()), &models::with(&lora, "\"r\": 2", &format!("\"r\": {rank}"))).unwrap_err();
        assert!(error.contains(&format!("expected [{rank}, 8]")), "{error}");
    }
}

#[test]
fn adapter_on_layers_that_the_model_has_not_is_refused_by_its_file() {
    let lora = models::exported(MethodKeys { lora_rank: Some(2), ..models::keys(FinetuningType::Lora) });
    let error = read_one(&models::adapter(Vec::new()), &models::with(&lora, "\"query_key_value\"", "\"q_proj\"")).unwrap_err();
    assert!(error.contains("adapter_config.json: key `target_modules`") && error.contains("nothing is called `q_proj`"), "{error}");
}

#[test]
fn adapter_of_whole_numbers_is_refused_by_its_file() {
    let mut prompt = models::exported(MethodKeys { num_virtual_tokens: Some(2), ..models::keys(FinetuningType::PromptTuning) });
    let weights = prompt.get_mut("adapter_model.safetensors").unwrap();
    let at = weights.windows(5).position(|w| w == b"\"F32\"").unwrap();
    weights[at + 1..at + 4].copy_from_slice(b"I32");
    let error = read_one(&models::adapter(Vec::new()), &prompt).unwrap_err();
    assert!(error.contains("adapter_model.safetensors: dtype I32 cannot be read as F32"), "{error}");
}

#[test]
fn pattern_of_a_million_characters_is_refused() {
    let error = configured("finetuning_type = 'lora'\nlora_target = '(a{1000}){1000}'").unwrap_err();
    assert!(error.contains("`method.lora_target`") && error.contains("regular expression"), "{error}");
}

#[test]
fn pattern_of_thirty_thousand_bytes_is_refused_before_it_is_parsed() {
    let pattern = format!("({})", ".a".repeat(15_000));
    let error = configured(&format!("finetuning_type = 'lora'\nlora_target = '{pattern}'")).unwrap_err();
    assert!(error.starts_with("`method.lora_target`"), "{}", &error[..200]);
    let lora =
        models::exported(MethodKeys { lora_rank: Some(2), lora_target: Some(".*dense".into()), ..models::keys(FinetuningType::Lora) });
    let json = serde_json::from_slice::<serde_json::Value>(&lora["adapter_config.json"]).unwrap();
    let targets = json["target_modules"].to_string();
    let folder = models::with(&models::compact(lora), &targets, &format!("\"{pattern}\""));
    let error = read_one(&models::adapter(Vec::new()), &folder).unwrap_err();
    assert!(error.ends_with("the expression has 30002 bytes, expected at most 4096)"), "{}", &error[error.len() - 200..]);
}

#[test]
fn sizes_whose_products_overflow_are_refused_by_their_keys() {
    for (lines, key) in [
        ("gradient_accumulation_steps = 4611686018427387905\nper_device_train_batch_size = 4", "batch.gradient_accumulation_steps"),
        ("per_device_train_batch_size = 4294967296\nglobal_batch_size = 4294967296", "batch.per_device_train_batch_size"),
        ("max_source_length = 9223372036854775807", "data.max_source_length"),
        ("max_target_length = 9223372036854775807", "data.max_target_length"),
        ("pre_seq_len = 9223372036854775807", "method.pre_seq_len"),
        ("finetuning_type = 'lora'\nlora_rank = 9223372036854775807", "method.lora_rank"),
    ] {
        let error = configured(lines).unwrap_err();
        assert!(error.starts_with(&format!("`{key}` is ")) && error.contains("run.toml:"), "{error}");
    }
}

#[test]
fn model_whose_sizes_multiply_beyond_64_bits_is_refused() {
    for (key, size) in [("ffn_hidden_size", 1u64 << 30), ("kv_channels", 2_147_483_644), ("padded_vocab_size", 2_147_483_647)] {
        let error = models::model_with(key, size).unwrap_err();
        assert!(error.contains("config.json: its sizes are those of more weights than any model has"), "{error}");
    }
}

#[test]
fn configuration_without_an_end_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    let error = config::load(Some(&path), &RunConfig::default()).unwrap_err().to_string();
    assert!(error.ends_with("run.toml: it has more than 65536 bytes"), "{error}");
}
