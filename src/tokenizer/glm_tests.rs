use super::super::sp_model::Piece;
use super::super::train_small;
use super::super::wire::Writer;
use super::*;

fn small_bytes() -> Vec<u8> {
    train_small(&["白色的裙子 white skirt".to_owned(), "白色的裙子 white shirt".to_owned()], 300)
}

fn parse(bytes: &[u8]) -> Result<GlmTokenizer, TokenizerError> {
    GlmTokenizer::from_bytes(bytes, Path::new("dir/tokenizer.model"))
}

fn refusal(bytes: &[u8]) -> String {
    let error = parse(bytes).unwrap_err();
    format!("{error}\nhint: {}", error.hint().unwrap_or_default())
}

/// The small model with a further trainer (field 2) or normalizer (field 3) option, which overrides what stands before.
fn with_option(spec: u32, option: &[u8]) -> Vec<u8> {
    let mut bytes = small_bytes();
    bytes.extend(Writer::default().bytes_field(spec, option).finish());
    bytes
}

#[test]
fn tokenizer_is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<GlmTokenizer>();
}

#[test]
fn foreign_files_are_refused_with_what_they_are() {
    let cases: [&[u8]; 5] = [b"", b"version https://git-lfs.github.com/spec/v1\noid", b" {\"a\": 1}", b"PK\x03\x04", b"\x80\x02}q\x00."];
    insta::assert_snapshot!(cases.map(refusal).join("\n"), @r"
    dir/tokenizer.model is not a SentencePiece model: it is empty
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    dir/tokenizer.model is not a SentencePiece model: it is a Git LFS pointer
    hint: fetch the real file with `git lfs pull`
    dir/tokenizer.model is not a SentencePiece model: it is JSON
    hint: use `tokenizer.model` of the same folder, not `tokenizer.json` or `tokenizer_config.json`
    dir/tokenizer.model is not a SentencePiece model: it is a zip archive
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    dir/tokenizer.model is not a SentencePiece model: byte 4: cut off: 8 bytes wanted
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    ");
}

#[test]
fn models_of_another_kind_are_refused_by_name() {
    let flag = |spec, number, value| refusal(&with_option(spec, &Writer::default().varint_field(number, value).finish()));
    let nmt = with_option(3, &Writer::default().bytes_field(1, b"nmt_nfkc").bytes_field(2, &[1; 99]).finish());
    let cases = [flag(2, 3, 1), flag(2, 3, 77), flag(2, 35, 0), flag(2, 24, 1), flag(3, 3, 0), flag(3, 4, 1), flag(3, 5, 0), refusal(&nmt)];
    insta::assert_snapshot!(cases.join("\n"), @r"
    dir/tokenizer.model: `model_type` is unigram, expected bpe
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    dir/tokenizer.model: `model_type` is 77, expected bpe
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    dir/tokenizer.model: `byte_fallback` is false, expected true
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    dir/tokenizer.model: `treat_whitespace_as_suffix` is true, expected false
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    dir/tokenizer.model: `add_dummy_prefix` is false, expected true
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    dir/tokenizer.model: `remove_extra_whitespaces` is true, expected false
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    dir/tokenizer.model: `escape_whitespaces` is false, expected true
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    dir/tokenizer.model: `normalizer` is `nmt_nfkc` with a table of 99 bytes, expected `identity`
    hint: glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2
    ");
}

#[test]
fn contradicting_pieces_are_refused() {
    let piece = |text: &str, score, kind| Piece { text: text.to_owned(), score, kind };
    let with = |extra: Piece| {
        let mut pieces = parse(&small_bytes()).unwrap().pieces().to_vec();
        pieces.push(extra);
        SpModel { pieces, unk: 0, eos: 2, bytes: Box::new([0; 256]) }.to_bytes()
    };
    let mut no_newline = parse(&small_bytes()).unwrap().pieces().to_vec();
    no_newline.remove(13);
    let no_newline = SpModel { pieces: no_newline, unk: 0, eos: 2, bytes: Box::new([0; 256]) }.to_bytes();
    let cases = [
        refusal(&with(piece("", 0.0, PieceKind::Normal))),
        refusal(&with(piece("<s>", 0.0, PieceKind::Normal))),
        refusal(&with(piece("x", f32::NAN, PieceKind::Normal))),
        refusal(&with(piece("<unk2>", 0.0, PieceKind::Unknown))),
        refusal(&with(piece("<0xfg>", 0.0, PieceKind::Byte))),
        refusal(&no_newline),
    ];
    insta::assert_snapshot!(cases.join("\n"), @r"
    dir/tokenizer.model: piece 285 is empty
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    dir/tokenizer.model: piece 285 `<s>` is there twice
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    dir/tokenizer.model: piece 285 has the score NaN
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    dir/tokenizer.model: piece 285 is a second unknown piece
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    dir/tokenizer.model: piece 285 `<0xfg>` names no byte
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    dir/tokenizer.model: the piece <0x0A> is missing
    hint: the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256
    ");
}

#[test]
fn missing_file_and_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(GlmTokenizer::from_file(&dir.path().join("none")), Err(TokenizerError::Io { .. })));
    assert!(matches!(GlmTokenizer::from_file(dir.path()), Err(TokenizerError::NotAFile { .. })));
    let huge = dir.path().join("huge");
    std::fs::File::create(&huge).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
    assert!(matches!(GlmTokenizer::from_file(&huge), Err(TokenizerError::TooLarge { .. })));
}

#[test]
fn model_of_another_vocabulary_is_refused_with_both_numbers() {
    let tokenizer = parse(&small_bytes()).unwrap();
    assert!(tokenizer.check_fits(tokenizer.vocab_size()).is_ok());
    assert!(tokenizer.check_fits(512).is_ok());
    for model in [tokenizer.vocab_size() - 1, 65_024] {
        let error = tokenizer.check_fits(model).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("has {} ids", tokenizer.vocab_size())) && text.contains(&format!("{model} rows")), "{text}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn special_ids_follow_the_pieces_and_decode_to_nothing() {
    let tokenizer = parse(&small_bytes()).unwrap();
    let first = tokenizer.num_pieces() as u32;
    assert_eq!(
        [tokenizer.mask(), tokenizer.gmask(), tokenizer.smask(), tokenizer.sop(), tokenizer.eop()],
        [0, 1, 2, 3, 4].map(|i| first + i)
    );
    let roles = tokenizer.role_ids();
    assert_eq!([roles.system, roles.user, roles.assistant, roles.observation], [5, 6, 7, 8].map(|i| first + i));
    let mut ids = tokenizer.prompt_prefix().to_vec();
    ids.extend(tokenizer.encode("白色").unwrap());
    ids.extend([tokenizer.eos(), first + 9, tokenizer.pad()]);
    assert_eq!(tokenizer.decode(&ids), "白色");
    assert_eq!(tokenizer.decode_with_special(&ids), format!("[gMASK]sop 白色</s><|id {}|><unk>", first + 9));
    assert_eq!(tokenizer.piece(roles.user), Some("<|user|>"));
    assert_eq!(tokenizer.piece(u32::MAX), None);
}

#[test]
fn special_words_in_text_stay_text() {
    let tokenizer = parse(&small_bytes()).unwrap();
    for word in SPECIAL_WORDS.into_iter().chain(["</s>", "<s>", "<unk>", "<0x0A>"]) {
        let ids = tokenizer.encode(word).unwrap();
        assert!(ids.iter().all(|&id| id > 2 && (id as usize) < tokenizer.num_pieces()), "{word}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids), word);
    }
}

#[test]
fn truncated_and_mutated_models_never_panic() {
    let bytes = small_bytes();
    for len in 0..bytes.len() {
        let _ = parse(&bytes[..len]);
    }
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut accepted = 0;
    for _ in 0..4000 {
        let mut mutated = bytes.clone();
        for _ in 0..=random(4) {
            let at = random(mutated.len());
            match random(4) {
                0 => mutated[at] = random(256) as u8,
                1 => mutated[at] ^= 1 << random(8),
                2 => drop(mutated.splice(at..at, [0xff; 3])),
                _ => drop(mutated.drain(at..(at + 1 + random(8)).min(mutated.len()))),
            }
        }
        if let Ok(tokenizer) = parse(&mutated) {
            accepted += 1;
            let ids = tokenizer.encode("白色的裙子 white skirt\n").unwrap();
            let _ = tokenizer.decode_with_special(&ids);
        }
    }
    assert!(accepted > 0, "every mutation was refused: the mutations are too coarse to test the tokenizer itself");
}
