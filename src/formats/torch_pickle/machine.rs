//! The pickle machine. Values live in an arena, so that no nesting, however deep, recurses.

use std::collections::{BTreeMap, HashMap};

use ::safetensors::Dtype;

use super::super::ParseError;

/// Operations and copied values that a pickle may take: a 6B model's has about 6,000. Bounds time and memory on hostile input.
const MAX_VALUES: usize = 1_000_000;
/// PyTorch's own limit is 64; a model's tensors have two.
const MAX_DIMS: usize = 16;

type Result<T> = std::result::Result<T, ParseError>;

/// A piece of raw memory that tensors are cut from.
#[derive(Clone, Debug)]
pub struct StorageRef<'a> {
    pub dtype: Dtype,
    pub key: &'a str,
    /// Elements of the storage, or of its view.
    pub len: usize,
    /// First element within the storage called `key` (views of the legacy format).
    pub view_offset: usize,
}

#[derive(Clone, Debug)]
pub struct TensorRecord<'a> {
    pub storage: StorageRef<'a>,
    /// Elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// Elements.
    pub strides: Vec<usize>,
}

/// The names that a file of tensors may call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Class {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// `_rebuild_from_type_v2(function, type, arguments, state)`
    RebuildFromType,
    ParameterType,
    Size,
    Storage(Dtype),
}

fn class(module: &str, name: &str) -> Result<Class> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Class::OrderedDict,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Class::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Class::RebuildParameter,
        ("torch._tensor", "_rebuild_from_type_v2") => Class::RebuildFromType,
        ("torch" | "torch._tensor", "Tensor") | ("torch.nn.parameter", "Parameter") => Class::ParameterType,
        ("torch", "Size") => Class::Size,
        ("torch", "DoubleStorage") => Class::Storage(Dtype::F64),
        ("torch", "FloatStorage") => Class::Storage(Dtype::F32),
        ("torch", "HalfStorage") => Class::Storage(Dtype::F16),
        ("torch", "BFloat16Storage") => Class::Storage(Dtype::BF16),
        ("torch", "LongStorage") => Class::Storage(Dtype::I64),
        ("torch", "IntStorage") => Class::Storage(Dtype::I32),
        ("torch", "ShortStorage") => Class::Storage(Dtype::I16),
        ("torch", "CharStorage") => Class::Storage(Dtype::I8),
        ("torch", "ByteStorage") => Class::Storage(Dtype::U8),
        ("torch", "BoolStorage") => Class::Storage(Dtype::BOOL),
        _ => return Err(ParseError::new(format!("it asks for `{module}.{name}`, which a file of tensors has no need of"))),
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Value<'a> {
    None,
    Bool(bool),
    Int(i128),
    Text(&'a str),
    Class(Class),
    Node(usize),
    /// A float, bytes, or an object's state: of no use here.
    Other,
}

/// A byte of a pickle can make one, so it is small.
#[derive(Debug)]
enum Node<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Storage(Box<StorageRef<'a>>),
    Tensor(Box<TensorRecord<'a>>),
}

/// What a pickle left on top of its stack.
#[derive(Debug)]
pub struct Unpickled<'a> {
    arena: Vec<Node<'a>>,
    root: Value<'a>,
    /// Bytes that the pickle took.
    pub len: usize,
}

impl<'a> Unpickled<'a> {
    pub fn int(&self) -> Option<i128> {
        if let Value::Int(i) = self.root { Some(i) } else { None }
    }

    /// The texts of a list.
    pub fn texts(&self) -> Option<Vec<&'a str>> {
        let Value::Node(i) = self.root else { return None };
        let Node::List(items) = &self.arena[i] else { return None };
        items.iter().map(|v| if let Value::Text(t) = v { Some(*t) } else { None }).collect()
    }

    /// A truth value in a dictionary.
    pub fn flag(&self, key: &str) -> Option<bool> {
        let Value::Node(i) = self.root else { return None };
        let Node::Dict(items) = &self.arena[i] else { return None };
        items.iter().rev().find(|(k, _)| *k == Value::Text(key)).and_then(|(_, v)| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    /// Every storage that the pickle speaks of.
    pub fn storages(&self) -> impl Iterator<Item = &StorageRef<'a>> {
        self.arena.iter().filter_map(|node| if let Node::Storage(s) = node { Some(&**s) } else { None })
    }

    /// The tensors of a dictionary; entries of other kinds are left out, and of entries with one name all but the last.
    pub fn tensors(self) -> Result<BTreeMap<&'a str, TensorRecord<'a>>> {
        let found = |what: &str| ParseError::new(format!("expected a dictionary of tensors, found {what}"));
        let Value::Node(root) = self.root else { return Err(found("a plain value")) };
        let Node::Dict(items) = &self.arena[root] else { return Err(found("a single object")) };
        let mut tensors = BTreeMap::new();
        for (name, value) in items {
            if let (Value::Text(name), Value::Node(i)) = (name, value)
                && let Node::Tensor(tensor) = &self.arena[*i]
            {
                tensors.insert(*name, (**tensor).clone());
            }
        }
        if tensors.is_empty() { Err(found("a dictionary without any at its top level")) } else { Ok(tensors) }
    }
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    arena: Vec<Node<'a>>,
    num_values: usize,
}

/// Runs the pickle at the start of `input` to its end.
///
/// # Errors
/// When the pickle is cut off, malformed, uses a name that is not allowed, or creates too many values.
pub fn unpickle(input: &[u8]) -> Result<Unpickled<'_>> {
    let mut m = Machine { input, at: 0, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new(), arena: Vec::new(), num_values: 0 };
    while m.step()? {
        m.count(1)?;
    }
    let root = m.pop()?;
    Ok(Unpickled { arena: m.arena, root, len: m.at })
}

impl<'a> Machine<'a> {
    fn count(&mut self, n: usize) -> Result<()> {
        self.num_values += n;
        if self.num_values > MAX_VALUES {
            Err(ParseError::new(format!("its pickle takes more than {MAX_VALUES} operations")))
        } else {
            Ok(())
        }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let bytes = self.at.checked_add(n).and_then(|end| self.input.get(self.at..end));
        let bytes = bytes.ok_or_else(|| ParseError::new("its pickle is cut off"))?;
        self.at += n;
        Ok(bytes)
    }

    fn take_uint(&mut self, n: usize) -> Result<usize> {
        let value = self.take(n)?.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
        usize::try_from(value).map_err(|_| ParseError::new("a length in its pickle overflows"))
    }

    fn take_text(&mut self, length_bytes: usize) -> Result<Value<'a>> {
        let n = self.take_uint(length_bytes)?;
        let text = std::str::from_utf8(self.take(n)?).map_err(|_| ParseError::new("its pickle holds text that is not UTF-8"))?;
        Ok(Value::Text(text))
    }

    fn take_line(&mut self) -> Result<&'a str> {
        let rest = &self.input[self.at..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or_else(|| ParseError::new("its pickle is cut off"))?;
        let line = std::str::from_utf8(self.take(n)?).map_err(|_| ParseError::new("a name in its pickle is not UTF-8"))?;
        self.at += 1;
        Ok(line)
    }

    /// A little-endian two's complement integer of any length; beyond 16 bytes its value is of no use here.
    fn take_long(&mut self, n: usize) -> Result<Value<'a>> {
        let bytes = self.take(n)?;
        if n > 16 {
            return Ok(Value::Other);
        }
        let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 16];
        wide[..n].copy_from_slice(bytes);
        Ok(Value::Int(i128::from_le_bytes(wide)))
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(ParseError::new("its pickle takes a value from an empty stack"));
        }
        self.stack.pop().ok_or_else(|| ParseError::new("its pickle takes a value from an empty stack"))
    }

    fn pop_n(&mut self, n: usize) -> Result<Vec<Value<'a>>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() < floor + n {
            return Err(ParseError::new("its pickle takes a value from an empty stack"));
        }
        Ok(self.stack.split_off(self.stack.len() - n))
    }

    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or_else(|| ParseError::new("its pickle takes a mark that is not there"))?;
        Ok(self.stack.split_off(mark))
    }

    fn push_node(&mut self, node: Node<'a>) {
        self.stack.push(Value::Node(self.arena.len()));
        self.arena.push(node);
    }

    fn top_node(&mut self) -> Result<&mut Node<'a>> {
        match self.stack.last() {
            Some(&Value::Node(i)) => Ok(&mut self.arena[i]),
            _ => Err(ParseError::new("its pickle adds items to something that takes none")),
        }
    }

    fn append(&mut self, values: Vec<Value<'a>>) -> Result<()> {
        match self.top_node()? {
            Node::List(items) => items.extend(values),
            _ => return Err(ParseError::new("its pickle appends to something that is not a list")),
        }
        Ok(())
    }

    fn set_items(&mut self, values: &[Value<'a>]) -> Result<()> {
        let (pairs, []) = values.as_chunks::<2>() else { return Err(ParseError::new("its pickle sets a key without a value")) };
        match self.top_node()? {
            Node::Dict(items) => items.extend(pairs.iter().map(|[k, v]| (*k, *v))),
            _ => return Err(ParseError::new("its pickle sets a key of something that is not a dictionary")),
        }
        Ok(())
    }

    fn remember(&mut self, key: usize) -> Result<()> {
        let value = *self.stack.last().ok_or_else(|| ParseError::new("its pickle remembers a value that is not there"))?;
        self.memo.insert(key as u32, value);
        Ok(())
    }

    fn recall(&mut self, key: usize) -> Result<()> {
        let value = *self.memo.get(&(key as u32)).ok_or_else(|| ParseError::new("its pickle recalls a value that is not there"))?;
        self.stack.push(value);
        Ok(())
    }

    /// Executes one operation; false after the last.
    fn step(&mut self) -> Result<bool> {
        let op = self.take(1)?[0];
        match op {
            0x80 => _ = self.take(1)?,
            0x95 => _ = self.take(8)?,
            b'.' => return Ok(false),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => _ = self.pop()?,
            b'1' => _ = self.pop_mark()?,
            b'2' => {
                let top = self.pop()?;
                self.stack.extend([top, top]);
            }
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' => self.push_int(1)?,
            b'M' => self.push_int(2)?,
            b'J' => {
                let value = self.take_long(4)?;
                self.stack.push(value);
            }
            0x8a | 0x8b => {
                let n = self.take_uint(if op == 0x8a { 1 } else { 4 })?;
                let value = self.take_long(n)?;
                self.stack.push(value);
            }
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Other);
            }
            b'X' | b'T' | 0x8c | b'U' | 0x8d => {
                let text = self.take_text(match op {
                    b'X' | b'T' => 4,
                    0x8d => 8,
                    _ => 1,
                })?;
                self.stack.push(text);
            }
            b'B' | b'C' | 0x8e => {
                let n = self.take_uint(match op {
                    b'B' => 4,
                    b'C' => 1,
                    _ => 8,
                })?;
                self.take(n)?;
                self.stack.push(Value::Other);
            }
            b')' => self.push_node(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let items = self.pop_n(usize::from(op - 0x84))?;
                self.push_node(Node::Tuple(items));
            }
            b't' => {
                let items = self.pop_mark()?;
                self.push_node(Node::Tuple(items));
            }
            b']' => self.push_node(Node::List(Vec::new())),
            b'l' => {
                let items = self.pop_mark()?;
                self.push_node(Node::List(items));
            }
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' => {
                let values = self.pop_mark()?;
                self.append(values)?;
            }
            b'}' => self.push_node(Node::Dict(Vec::new())),
            b'd' => {
                let values = self.pop_mark()?;
                self.push_node(Node::Dict(Vec::new()));
                self.set_items(&values)?;
            }
            b's' => {
                let pair = self.pop_n(2)?;
                self.set_items(&pair)?;
            }
            b'u' => {
                let values = self.pop_mark()?;
                self.set_items(&values)?;
            }
            b'q' | b'r' => {
                let key = self.take_uint(if op == b'q' { 1 } else { 4 })?;
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' | b'j' => {
                let key = self.take_uint(if op == b'h' { 1 } else { 4 })?;
                self.recall(key)?;
            }
            b'c' => {
                let (module, name) = (self.take_line()?, self.take_line()?);
                self.stack.push(Value::Class(class(module, name)?));
            }
            0x93 => match self.pop_n(2)?[..] {
                [Value::Text(module), Value::Text(name)] => self.stack.push(Value::Class(class(module, name)?)),
                _ => return Err(ParseError::new("its pickle names a global by something that is not text")),
            },
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push_node(Node::Storage(Box::new(storage)));
            }
            b'R' => {
                let args = self.pop()?;
                let function = self.pop()?;
                let value = self.call(function, args)?;
                self.stack.push(value);
            }
            // An object's attributes, such as `_metadata` of a state_dict: not needed.
            b'b' => _ = self.pop()?,
            other => {
                return Err(ParseError::new(format!("its pickle uses operation 0x{other:02x}, which a file of tensors has no need of")));
            }
        }
        Ok(true)
    }

    fn push_int(&mut self, num_bytes: usize) -> Result<()> {
        let value = self.take_uint(num_bytes)? as i128;
        self.stack.push(Value::Int(value));
        Ok(())
    }

    fn tuple(&self, value: Value<'a>) -> Result<&[Value<'a>]> {
        match value {
            Value::Node(i) => match &self.arena[i] {
                Node::Tuple(items) | Node::List(items) => Ok(items),
                _ => Err(ParseError::new("its pickle has something else where a tuple belongs")),
            },
            _ => Err(ParseError::new("its pickle has something else where a tuple belongs")),
        }
    }

    fn sizes(&self, value: Value<'a>) -> Result<Vec<usize>> {
        let sizes = self.tuple(value)?;
        if sizes.len() > MAX_DIMS {
            return Err(ParseError::new(format!("its pickle has a tensor of {} dimensions", sizes.len())));
        }
        sizes.iter().map(|&v| size(v)).collect()
    }

    /// `("storage", type, key, location, length[, view])`; view: `(key, offset, length)` or none.
    fn storage(&self, id: Value<'a>) -> Result<StorageRef<'a>> {
        match *self.tuple(id)? {
            [Value::Text("storage"), Value::Class(Class::Storage(dtype)), Value::Text(key), Value::Text(_), len, ref view @ ..] => {
                let (view_offset, len) = match *view {
                    [] | [Value::None] => (0, size(len)?),
                    [view] => match *self.tuple(view)? {
                        [_, offset, view_len] => (size(offset)?, size(view_len)?),
                        _ => return Err(ParseError::new("its pickle describes a view of a storage in an unknown way")),
                    },
                    _ => return Err(ParseError::new("its pickle describes a storage in an unknown way")),
                };
                Ok(StorageRef { dtype, key, len, view_offset })
            }
            _ => Err(ParseError::new("its pickle describes a storage in an unknown way")),
        }
    }

    fn call(&mut self, function: Value<'a>, args: Value<'a>) -> Result<Value<'a>> {
        let Value::Class(class) = function else { return Err(ParseError::new("its pickle calls something that is not a function")) };
        self.count(self.tuple(args)?.iter().filter_map(|&v| self.tuple(v).ok()).map(<[_]>::len).sum())?;
        let args = self.tuple(args)?;
        let node = match (class, args) {
            (Class::OrderedDict, []) => Node::Dict(Vec::new()),
            (Class::OrderedDict, &[pairs]) => {
                let pairs = self.tuple(pairs)?.iter().map(|&pair| match *self.tuple(pair)? {
                    [k, v] => Ok((k, v)),
                    _ => Err(ParseError::new("its pickle makes a dictionary of something else than pairs")),
                });
                Node::Dict(pairs.collect::<Result<_>>()?)
            }
            (Class::RebuildTensor, &[Value::Node(storage), offset, shape, strides, ..]) => {
                let Node::Storage(storage) = &self.arena[storage] else {
                    return Err(ParseError::new("its pickle makes a tensor of something else than a storage"));
                };
                let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
                Node::Tensor(Box::new(TensorRecord { storage: (**storage).clone(), offset: size(offset)?, shape, strides }))
            }
            (Class::RebuildParameter, &[data, ..]) => return Ok(data),
            (Class::RebuildFromType, &[Value::Class(function @ Class::RebuildTensor), Value::Class(Class::ParameterType), args, ..]) => {
                return self.call(Value::Class(function), args);
            }
            (Class::Size, &[sizes]) => Node::Tuple(self.tuple(sizes)?.to_vec()),
            _ => return Err(ParseError::new(format!("its pickle calls {class:?} with unknown arguments"))),
        };
        self.arena.push(node);
        Ok(Value::Node(self.arena.len() - 1))
    }
}

fn size(value: Value<'_>) -> Result<usize> {
    match value {
        Value::Int(i) => usize::try_from(i).map_err(|_| ParseError::new(format!("its pickle has {i} where a size belongs"))),
        _ => Err(ParseError::new("its pickle has something else where a size belongs")),
    }
}
