//! The published tokenizer's ids and texts, for every golden folder that has them.

use std::path::Path;

use glmddp::tokenizer::GlmTokenizer;
use serde_json::Value;

use crate::not_run::{Missing, not_run};
use crate::support;

/// Calls `check` with each root's `tokenizer/<file>`, and prints how many items it compared.
fn for_each_golden(file: &str, check: impl Fn(&GlmTokenizer, &Value) -> usize) {
    let Some(model) = support::shared("chatglm2/tokenizer.model") else { return };
    let tokenizer = GlmTokenizer::from_file(&model).expect("the published tokenizer loads");
    let mut found = false;
    for root in support::golden_roots() {
        let path = root.join("tokenizer").join(file);
        if !path.exists() {
            continue;
        }
        found = true;
        let compared = check(&tokenizer, &read(&path));
        assert!(compared > 0, "{} has nothing to compare", path.display());
        println!("golden {}: {compared} items equal", path.display());
    }
    if !found {
        not_run(Missing::Shared, &format!("no golden folder has tokenizer/{file}, and the test needs it"));
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a readable golden file")).expect("JSON")
}

fn array(value: &Value) -> &[Value] {
    value.as_array().expect("a JSON array")
}

fn text<'a>(item: &'a Value, key: &str) -> &'a str {
    item[key].as_str().unwrap_or_else(|| panic!("no text `{key}` in {item}"))
}

fn ids(item: &Value, key: &str) -> Vec<u32> {
    array(&item[key]).iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).expect("an id")).collect()
}

fn with_prefix(tokenizer: &GlmTokenizer, text: &str) -> Vec<u32> {
    let mut ids = tokenizer.prompt_prefix().to_vec();
    ids.extend(tokenizer.encode(text).expect("ids"));
    ids
}

#[test]
fn golden_tokenizer_strings_give_the_published_ids_pieces_and_texts() {
    for_each_golden("strings.json", |tokenizer, golden| {
        for item in array(golden) {
            let source = text(item, "text");
            let sp_ids = tokenizer.encode(source).unwrap();
            assert_eq!(sp_ids, ids(item, "sp_ids"), "{source:?}");
            assert_eq!(tokenizer.pipeline().encode_fast(source, false).unwrap().get_ids(), sp_ids, "{source:?}");
            assert_eq!(tokenizer.pipeline().decode(&sp_ids, false).unwrap(), text(item, "sp_decode"));
            assert_eq!(with_prefix(tokenizer, source), ids(item, "ids"), "{source:?}");
            let pieces: Vec<&str> = sp_ids.iter().map(|&id| tokenizer.piece(id).unwrap()).collect();
            let expected: Vec<&str> = array(&item["pieces"]).iter().map(|piece| piece.as_str().unwrap()).collect();
            assert_eq!(pieces, expected, "{source:?}");
            assert_eq!(tokenizer.decode(&sp_ids), text(item, "sp_decode"));
            let mut all = ids(item, "ids");
            assert_eq!(tokenizer.decode(&all), text(item, "decode"));
            all.push(tokenizer.eos());
            assert_eq!(tokenizer.decode(&all), text(item, "decode_skip_special"));
        }
        array(golden).len()
    });
}

#[test]
fn golden_tokenizer_special_ids_are_the_published_ones() {
    for_each_golden("special.json", |tokenizer, golden| {
        let ours = [
            ("[MASK]", tokenizer.mask()),
            ("[gMASK]", tokenizer.gmask()),
            ("[sMASK]", tokenizer.smask()),
            ("sop", tokenizer.sop()),
            ("eop", tokenizer.eop()),
            ("<eos>", tokenizer.eos()),
            ("<pad>", tokenizer.pad()),
        ];
        for (word, id) in ours {
            assert_eq!(golden["special"][word], id, "{word}");
        }
        assert_eq!(golden["n_pieces"], tokenizer.num_pieces());
        assert_eq!(golden["vocab_size"], tokenizer.vocab_size());
        ours.len() + 2
    });
}

#[test]
fn golden_tokenizer_prompts_give_the_published_ids() {
    for_each_golden("prompts.json", |tokenizer, golden| {
        for item in array(golden) {
            let prompt = text(item, "prompt");
            assert_eq!(with_prefix(tokenizer, prompt), ids(item, "ids"), "{prompt:?}");
        }
        array(golden).len()
    });
}

#[test]
fn golden_tokenizer_of_chatglm2_fits_its_embedding_only() {
    let Some(model) = support::shared("chatglm2/tokenizer.model") else { return };
    let tokenizer = GlmTokenizer::from_file(&model).unwrap();
    assert_eq!(tokenizer.sha256(), "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2");
    assert!(tokenizer.check_fits(65_024).is_ok());
    assert!(tokenizer.check_fits(64_793).is_err());
    assert!(tokenizer.check_fits(151_552).is_err());
}

#[test]
fn golden_tokenizer_file_cut_or_mutated_never_panics() {
    let Some(path) = support::shared("chatglm2/tokenizer.model") else { return };
    let bytes = std::fs::read(&path).unwrap();
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..60 {
        let mut changed = bytes.clone();
        if round % 2 == 0 {
            changed.truncate(random(bytes.len()));
        } else {
            // The last bytes hold the options.
            let at = if round % 4 == 1 { bytes.len() - 1 - random(300) } else { random(bytes.len()) };
            changed[at] ^= 1 << random(8);
        }
        if let Ok(tokenizer) = GlmTokenizer::from_bytes(&changed, &path) {
            let ids = tokenizer.encode("类型#裙*颜色#白色 white\n").unwrap();
            let _ = tokenizer.decode(&ids);
        }
    }
}
