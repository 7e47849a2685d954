//! Tokenizes a file once, by all ranks together, or takes it from the cache.
//!
//! The rows are read in windows. Of each window every rank tokenizes one contiguous share on its threads; the shares are gathered in rank
//! order, so that the result, a bad row included, is the same for any number of ranks. No rank waits with a timeout.

use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::bad_rows::RowError;
use super::cache::{self, CacheKey};
use super::column_use::Beside;
use super::record::{Columns, OnBadRow, RowParser};
use super::rows::{RawRow, Rows, open_file};
use super::tokenize::{Encode, Limits, SampleMaker, Tokenized};
use super::{DataError, Dataset, Exchange, wire};

/// Rows read before an exchange.
const WINDOW: usize = 1 << 16;
/// Rows that a thread tokenizes at a time.
const CHUNK: usize = 16;
/// Largest message when rank 0 gives the others a cached set (bytes).
const MESSAGE_BYTES: usize = 1 << 26;

/// Which rows to load, and how.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    pub file: PathBuf,
    pub columns: Columns,
    pub limits: Limits,
    pub on_bad_row: OnBadRow,
    /// At most so many good rows from the beginning of the file.
    pub max_samples: Option<usize>,
    pub cache: Option<CacheRequest>,
}

#[derive(Clone, Debug)]
pub struct CacheRequest {
    /// Used by rank 0 only; the others get the rows from it.
    pub dir: PathBuf,
    /// Tokenize even if the rows are cached.
    pub overwrite: bool,
}

/// What became of the cache; on ranks other than 0 only [`CacheUse::Off`], `Hit` and `Built` occur.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheUse {
    Off,
    Hit(PathBuf),
    Built(PathBuf),
    /// The file could not be trusted and was made anew.
    Rebuilt {
        path: PathBuf,
        reason: String,
    },
    /// The rows are loaded, but could not be kept.
    NotKept {
        path: PathBuf,
        reason: String,
    },
}

/// Loads the rows of `request`; every rank calls it and gets the same set. The caller reports the bad rows and what became of the cache.
///
/// # Errors
/// As [`Rows::open`]; the first bad row of the file under [`OnBadRow::Stop`]; no good row at all; limits without room for the template; files
/// that differ between ranks; a failure of another rank.
pub fn load(request: &LoadRequest, tokenizer: &dyn Encode, group: &dyn Exchange) -> Result<(Dataset, CacheUse), DataError> {
    let maker = SampleMaker::new(tokenizer, request.limits)?;
    if request.max_samples == Some(0) {
        return Err(DataError::Zero { key: "max_samples" });
    }
    let (rows, hash) = same_file(request, group)?;
    let Some(cache) = &request.cache else {
        return Ok((tokenize_together(request, rows, &maker, group)?, CacheUse::Off));
    };
    let key = CacheKey {
        file: &hash,
        tokenizer: &tokenizer.identity(),
        columns: &request.columns,
        limits: request.limits,
        on_bad_row: request.on_bad_row,
        max_samples: request.max_samples,
    };
    let path = key.path(&cache.dir);
    let found = if cache.overwrite || group.rank() != 0 { Ok(None) } else { checked_read(&path, &request.file) };
    let damage = found.as_ref().err().cloned();
    if let Some(payload) = from_rank_0(found.ok().flatten(), group)? {
        let set = wire::decode(&payload, &request.file).map_err(|message| DataError::Exchange { message })?;
        return Ok((set, CacheUse::Hit(path)));
    }
    let set = tokenize_together(request, rows, &maker, group)?;
    if group.rank() != 0 {
        return Ok((set, CacheUse::Built(path)));
    }
    let kept = wire::encode(&set).and_then(|payload| cache::write(&path, &payload).map_err(|e| e.to_string()));
    let used = match (kept, damage) {
        (Ok(()), None) => CacheUse::Built(path),
        (Ok(()), Some(reason)) => CacheUse::Rebuilt { path, reason },
        (Err(reason), _) => CacheUse::NotKept { path, reason },
    };
    Ok((set, used))
}

fn checked_read(path: &Path, file: &Path) -> Result<Option<Vec<u8>>, String> {
    let Some(payload) = cache::read(path)? else { return Ok(None) };
    wire::decode(&payload, file).map_err(|reason| format!("is damaged: {reason}"))?;
    Ok(Some(payload))
}

/// Opens the file on every rank and makes sure that all read the same rows.
fn same_file(request: &LoadRequest, group: &dyn Exchange) -> Result<(Rows, String), DataError> {
    let opened = Rows::open(&request.file, &request.columns).and_then(|rows| {
        let read = |source| DataError::Read { path: request.file.clone(), source };
        let hash = cache::sha256_of(open_file(&request.file)?).map_err(read)?;
        Ok((rows, hash))
    });
    let (rows, hashes) = together(group, opened.map(|(rows, hash)| (rows, hash.into_bytes())))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let expected = text(&hashes[0]);
    match hashes.iter().position(|hash| *hash != hashes[0]) {
        None => Ok((rows, expected)),
        Some(rank) => Err(DataError::OtherFile { path: request.file.clone(), rank, expected, found: text(&hashes[rank]) }),
    }
}

fn tokenize_together(request: &LoadRequest, mut rows: Rows, maker: &SampleMaker<'_>, group: &dyn Exchange) -> Result<Dataset, DataError> {
    let mut set = Dataset::new(&request.file);
    let wanted = request.max_samples.unwrap_or(usize::MAX);
    let mut num_rows = 0;
    while set.num_samples() < wanted {
        let share = next_window(&mut rows, WINDOW.min(wanted - set.num_samples())).and_then(|window| {
            let own = share_of(window.len(), group.world_size(), group.rank());
            let share = tokenize_share(&window[own], rows.parser(), maker, request);
            Ok((window.len(), wire::encode(&share).map_err(|message| DataError::Exchange { message })?))
        });
        let (window_len, shares) = together(group, share)?;
        if window_len == 0 {
            break;
        }
        num_rows += window_len;
        for share in shares {
            let share = wire::decode(&share, &request.file).map_err(|message| DataError::Exchange { message })?;
            if let (OnBadRow::Stop, Some(error)) = (request.on_bad_row, share.bad_rows.first.first()) {
                return Err(DataError::BadRow(Box::new(error.clone())));
            }
            set.append(&share);
        }
    }
    if set.num_samples() == 0 {
        return Err(rows.without_good(num_rows, set.bad_rows));
    }
    set.check_size()?;
    set.column_use.check(&request.columns, &request.file)?;
    Ok(set)
}

fn next_window(rows: &mut Rows, max: usize) -> Result<Vec<RawRow>, DataError> {
    let mut window = Vec::new();
    while window.len() < max {
        match rows.next_raw()? {
            Some(row) => window.push(row),
            None => break,
        }
    }
    Ok(window)
}

/// The share of `rank` of `n` things: contiguous, the first ranks get one more where `world_size` does not divide `n`.
pub(super) fn share_of(n: usize, world_size: usize, rank: usize) -> Range<usize> {
    let (each, more) = (n / world_size, n % world_size);
    let start = rank * each + rank.min(more);
    start..start + each + usize::from(rank < more)
}

/// Tokenizes rows on this rank's threads. What a row holds beside its text is counted at once, not kept.
fn tokenize_share(share: &[RawRow], parser: &RowParser, maker: &SampleMaker<'_>, request: &LoadRequest) -> Dataset {
    let chunk = |rows: &[RawRow]| {
        let mut set = Dataset::new(&request.file);
        for raw in rows {
            match tokenize(raw, parser, maker) {
                Ok((row, beside)) => {
                    set.push(row.sample.as_ref(), raw.row);
                    set.num_cut_prompts += usize::from(row.prompt_cut);
                    set.num_cut_answers += usize::from(row.answer_cut);
                    set.column_use.push(&beside);
                }
                Err(error) => set.bad_rows.push(*error),
            }
        }
        set
    };
    let chunks: Vec<Dataset> = share.par_chunks(CHUNK).map(chunk).collect();
    let mut set = Dataset::new(&request.file);
    chunks.iter().for_each(|chunk| set.append(chunk));
    set
}

fn tokenize(raw: &RawRow, parser: &RowParser, maker: &SampleMaker<'_>) -> Result<(Tokenized, Beside), Box<RowError>> {
    let row = parser.parse(raw)?;
    let tokenized = maker.make(&row.example).map_err(|message| parser.not_tokenized(raw.row, message))?;
    Ok((tokenized, row.beside))
}

/// Gathers every rank's bytes, or fails on every rank when one of them failed: with its own error there, with its name elsewhere.
fn together<T>(group: &dyn Exchange, mine: Result<(T, Vec<u8>), DataError>) -> Result<(T, Vec<Vec<u8>>), DataError> {
    const FAILED: u8 = 0;
    const FINE: u8 = 1;
    let message = match &mine {
        Ok((_, bytes)) => [&[FINE], bytes.as_slice()].concat(),
        Err(error) => [&[FAILED], error.to_string().as_bytes()].concat(),
    };
    let gathered = group.all_gather(&message).map_err(|message| DataError::Exchange { message });
    let (value, _) = mine?;
    let mut all = gathered?;
    if all.len() != group.world_size() {
        return Err(DataError::Exchange { message: format!("{} messages from {} ranks", all.len(), group.world_size()) });
    }
    for (rank, bytes) in all.iter_mut().enumerate() {
        match bytes.first() {
            Some(&FINE) => drop(bytes.drain(..1)),
            Some(&FAILED) => return Err(DataError::OtherRank { rank, message: String::from_utf8_lossy(&bytes[1..]).into_owned() }),
            _ => return Err(DataError::Exchange { message: format!("rank {rank} sent something else") }),
        }
    }
    Ok((value, all))
}

/// Gives every rank what rank 0 has.
fn from_rank_0(mine: Option<Vec<u8>>, group: &dyn Exchange) -> Result<Option<Vec<u8>>, DataError> {
    let gather = |bytes: &[u8]| {
        let all = group.all_gather(bytes).map_err(|message| DataError::Exchange { message })?;
        all.into_iter().next().ok_or_else(|| DataError::Exchange { message: "no message from rank 0".to_owned() })
    };
    let length = mine.as_ref().map_or_else(Vec::new, |bytes| (bytes.len() as u64).to_le_bytes().to_vec());
    let length = gather(&length)?;
    let Ok(length) = <[u8; 8]>::try_from(length.as_slice()) else { return Ok(None) };
    let length = u64::from_le_bytes(length) as usize;
    let payload = mine.unwrap_or_default();
    if group.world_size() == 1 {
        return Ok(Some(payload));
    }
    let mut all = Vec::with_capacity(length);
    while all.len() < length {
        let piece = if group.rank() == 0 { &payload[all.len()..length.min(all.len() + MESSAGE_BYTES)] } else { &[] };
        let piece = gather(piece)?;
        if piece.is_empty() {
            return Err(DataError::Exchange { message: "rank 0 sent fewer rows than it said".to_owned() });
        }
        all.extend(piece);
    }
    Ok(Some(all))
}
