//! What a machine that loses its power may find on its disk: calls that were recorded are replayed on a model in which content and names
//! are durable only once they were synced.
//!
//! The rules are those of POSIX and no kinder, as in ALICE (Pillai et al. 2014): syncing a file makes its content durable and not its name;
//! syncing a folder makes the names in it durable and not its own; a rename is atomic; changes that were not synced may be kept or lost each by itself.

use std::collections::BTreeMap;
use std::path::Path;

use glmddp::checkpoint::Call;

/// What becomes of changes that were not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsynced {
    /// All is kept: the processes were killed, and the machine runs on.
    Kept,
    /// All is lost.
    Lost,
    /// Names are kept, and their content is lost: files are empty, or as they were synced.
    Empty,
    /// Names are kept, and of content a part.
    Cut(u64),
    /// Each change of a name is kept or lost by itself, and of content a part is kept, behind which may be zeros.
    Any(u64),
}

/// Files by relative path; a folder has no content.
pub type Tree = BTreeMap<String, Option<Vec<u8>>>;

/// A file system whose root is durable.
pub struct Model {
    nodes: Vec<Node>,
}

enum Node {
    File { now: Vec<u8>, synced: Option<Vec<u8>> },
    Folder { now: Names, synced: Names, changes: Vec<Change> },
}

type Names = BTreeMap<String, usize>;

/// Of the names in one folder, not yet synced.
#[derive(Clone)]
enum Change {
    Set(String, usize),
    Unset(String),
    Move(String, String, usize),
}

fn apply(names: &mut Names, change: Change) {
    match change {
        Change::Set(name, node) => drop(names.insert(name, node)),
        Change::Unset(name) => drop(names.remove(&name)),
        Change::Move(from, to, node) => {
            names.remove(&from);
            names.insert(to, node);
        }
    }
}

fn empty_folder() -> Node {
    Node::Folder { now: Names::new(), synced: Names::new(), changes: Vec::new() }
}

/// splitmix64.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Model {
    /// After calls below the folder `root`, which held `before`, durable.
    pub fn after<'c>(root: &Path, before: &Tree, calls: impl IntoIterator<Item = &'c Call>) -> Self {
        let mut model = Self { nodes: vec![empty_folder()] };
        for (path, content) in before {
            let node = content.as_ref().map_or_else(empty_folder, |bytes| Node::File { now: bytes.clone(), synced: Some(bytes.clone()) });
            let (folder, name) = model.place(&path.split('/').map(str::to_owned).collect::<Vec<_>>());
            model.add(folder, name, node);
        }
        for node in &mut model.nodes {
            if let Node::Folder { now, synced, changes } = node {
                synced.clone_from(now);
                changes.clear();
            }
        }
        for call in calls {
            model.replay(root, call);
        }
        model
    }

    fn replay(&mut self, root: &Path, call: &Call) {
        let parts = |path: &Path| -> Vec<String> {
            let inside = path.strip_prefix(root).expect("calls are below the root");
            inside.iter().map(|part| part.to_string_lossy().into_owned()).collect()
        };
        match call {
            Call::MakeFolder(path) => {
                let mut at = 0;
                for name in parts(path) {
                    at = self.child(at, &name).unwrap_or_else(|| self.add(at, name, empty_folder()));
                }
            }
            Call::Create(path) => {
                let (folder, name) = self.place(&parts(path));
                match self.child(folder, &name) {
                    Some(file) => self.write(file, |now| now.clear()),
                    None => drop(self.add(folder, name, Node::File { now: Vec::new(), synced: None })),
                }
            }
            Call::Write(path, bytes) => {
                let file = self.find(&parts(path));
                self.write(file, |now| now.extend_from_slice(bytes));
            }
            Call::Sync(path) => {
                let file = self.find(&parts(path));
                let Node::File { now, synced } = &mut self.nodes[file] else { panic!("{} is no file", path.display()) };
                *synced = Some(now.clone());
            }
            Call::Rename(from, to) => {
                let ((folder, from), (to_folder, to)) = (self.place(&parts(from)), self.place(&parts(to)));
                assert_eq!(folder, to_folder, "renaming between folders is not modelled");
                let node = self.child(folder, &from).expect("the name was there");
                self.change(folder, Change::Move(from, to, node));
            }
            Call::SyncFolder(path) => {
                let folder = self.find(&parts(path));
                let Node::Folder { now, synced, changes } = &mut self.nodes[folder] else { panic!("{} is no folder", path.display()) };
                synced.clone_from(now);
                changes.clear();
            }
            Call::RemoveFile(path) | Call::RemoveFolder(path) => {
                let (folder, name) = self.place(&parts(path));
                self.change(folder, Change::Unset(name));
            }
        }
    }

    fn child(&self, folder: usize, name: &str) -> Option<usize> {
        let Node::Folder { now, .. } = &self.nodes[folder] else { panic!("`{name}` is below a file") };
        now.get(name).copied()
    }

    fn find(&self, parts: &[String]) -> usize {
        parts.iter().fold(0, |at, name| self.child(at, name).expect("the name is there"))
    }

    fn place(&self, parts: &[String]) -> (usize, String) {
        let (name, folders) = parts.split_last().expect("a path below the root");
        (self.find(folders), name.clone())
    }

    fn change(&mut self, folder: usize, change: Change) {
        let Node::Folder { now, changes, .. } = &mut self.nodes[folder] else { panic!("names are in folders") };
        apply(now, change.clone());
        changes.push(change);
    }

    fn add(&mut self, folder: usize, name: String, node: Node) -> usize {
        self.nodes.push(node);
        let added = self.nodes.len() - 1;
        self.change(folder, Change::Set(name, added));
        added
    }

    fn write(&mut self, file: usize, change: impl FnOnce(&mut Vec<u8>)) {
        let Node::File { now, .. } = &mut self.nodes[file] else { panic!("content is in files") };
        change(now);
    }

    /// What is found when the power comes back.
    pub fn found(&self, unsynced: Unsynced) -> Tree {
        let mut seed = match unsynced {
            Unsynced::Cut(seed) | Unsynced::Any(seed) => seed,
            _ => 0,
        };
        let mut tree = Tree::new();
        self.collect(0, "", unsynced, &mut seed, &mut tree);
        tree
    }

    fn collect(&self, node: usize, path: &str, unsynced: Unsynced, seed: &mut u64, tree: &mut Tree) {
        match &self.nodes[node] {
            Node::File { now, synced } => {
                tree.insert(path.to_owned(), Some(content(now, synced.as_deref(), unsynced, seed)));
            }
            Node::Folder { now, synced, changes } => {
                let names = match unsynced {
                    Unsynced::Kept | Unsynced::Empty | Unsynced::Cut(_) => now.clone(),
                    Unsynced::Lost => synced.clone(),
                    Unsynced::Any(_) => {
                        let mut names = synced.clone();
                        changes.iter().filter(|_| random(seed) & 1 == 1).for_each(|change| apply(&mut names, change.clone()));
                        names
                    }
                };
                if !path.is_empty() {
                    tree.insert(path.to_owned(), None);
                }
                for (name, child) in names {
                    let below = if path.is_empty() { name } else { format!("{path}/{name}") };
                    self.collect(child, &below, unsynced, seed, tree);
                }
            }
        }
    }
}

fn content(now: &[u8], synced: Option<&[u8]>, unsynced: Unsynced, seed: &mut u64) -> Vec<u8> {
    if synced == Some(now) {
        return now.to_vec();
    }
    let mut kept = || now[..random(seed) as usize % (now.len() + 1)].to_vec();
    match unsynced {
        Unsynced::Kept => now.to_vec(),
        Unsynced::Lost | Unsynced::Empty => synced.unwrap_or_default().to_vec(),
        Unsynced::Cut(_) => kept(),
        Unsynced::Any(_) => {
            let mut bytes = kept();
            if random(seed) & 1 == 1 {
                bytes.resize(now.len(), 0);
            }
            bytes
        }
    }
}

#[test]
fn what_was_not_synced_is_lost_kept_or_cut() {
    let root = Path::new("/r");
    let path = |name: &str| root.join(name);
    let calls = [
        Call::MakeFolder(path("d")),
        Call::SyncFolder(path("")),
        Call::Create(path("d/a")),
        Call::Write(path("d/a"), b"old".to_vec()),
        Call::Sync(path("d/a")),
        Call::SyncFolder(path("d")),
        Call::Write(path("d/a"), b" and new".to_vec()),
        Call::Rename(path("d/a"), path("d/b")),
        Call::Create(path("d/c")),
        Call::Write(path("d/c"), b"c".to_vec()),
        Call::Sync(path("d/c")),
    ];
    let found = |unsynced, num_calls| {
        let tree = Model::after(root, &Tree::new(), &calls[..num_calls]).found(unsynced);
        let text = |(name, content): (String, Option<Vec<u8>>)| match content {
            None => format!("{name}/"),
            Some(bytes) => format!("{name}={}", String::from_utf8(bytes).unwrap()),
        };
        tree.into_iter().map(text).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(found(Unsynced::Kept, calls.len()), "d/ d/b=old and new d/c=c");
    assert_eq!(found(Unsynced::Lost, calls.len()), "d/ d/a=old", "a synced file without a synced name is lost");
    assert_eq!(found(Unsynced::Empty, calls.len()), "d/ d/b=old d/c=c");
    assert_eq!(found(Unsynced::Lost, 1), "");
    assert_eq!(found(Unsynced::Lost, 5), "d/");
    let any: std::collections::BTreeSet<String> = (0..200).map(|seed| found(Unsynced::Any(seed), calls.len())).collect();
    assert!(any.iter().any(|tree| tree.starts_with("d/ d/a=") && tree.ends_with("d/c=c")), "each change by itself: {any:?}");
    assert!(any.iter().any(|tree| tree.starts_with("d/ d/b=") && !tree.contains("d/c")), "{any:?}");
    assert!(any.iter().all(|tree| tree.contains("d/a=") != tree.contains("d/b=")), "a rename is atomic: {any:?}");
    let cut: std::collections::BTreeSet<String> = (0..200).map(|seed| found(Unsynced::Cut(seed), calls.len())).collect();
    assert_eq!(cut.len(), "old and new".len() + 1);
}
