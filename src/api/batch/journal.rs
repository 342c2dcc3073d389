//! What a batch has answered: its output file, to which every answer is added as one line.
//!
//! A line that is there with its end is an answer; a last one without was being written when the process was killed, and
//! is cut off. Nothing else is ever taken away, and a file that holds anything else is not touched.

use super::input::Input;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// What every result begins with.
const HEAD: &str = r#"{"id":"batch_req_"#;

/// Why a file cannot be the output of a batch.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("it cannot be written: {0}")]
    Io(#[from] io::Error),
    #[error("another process is writing it")]
    Locked,
    #[error("line {0} is no result of a batch: give another file")]
    NotAResult(usize),
    #[error("line {line} answers `{custom_id}`, which is not asked like that: it belongs to another input")]
    Foreign { line: usize, custom_id: String },
    #[error("line {line} answers `{custom_id}` a second time")]
    Twice { line: usize, custom_id: String },
}

/// How far a batch is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub total: usize,
    /// Answered with 200.
    pub completed: usize,
    /// Answered with anything else.
    pub failed: usize,
}

/// The answer to one request, on its way to the file.
#[derive(Debug)]
pub struct Answer {
    pub index: usize,
    /// With the line's end.
    pub line: Vec<u8>,
    pub succeeded: bool,
}

/// An output file, held by this process alone.
#[derive(Debug)]
pub struct Journal {
    file: File,
    answered: Vec<bool>,
    counts: Counts,
    bytes: u64,
}

impl Journal {
    /// Opens or makes the file and reads what `input` has been answered already. Blocks.
    pub fn open(path: &Path, input: &Input) -> Result<Self, JournalError> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => JournalError::Locked,
            TryLockError::Error(error) => JournalError::Io(error),
        })?;
        let counts = Counts { total: input.count(), ..Counts::default() };
        let mut journal = Self { file, answered: vec![false; input.count()], counts, bytes: 0 };
        journal.recall(input)?;
        Ok(journal)
    }

    fn recall(&mut self, input: &Input) -> Result<(), JournalError> {
        let mut reader = BufReader::new(self.file.try_clone()?);
        reader.seek(SeekFrom::Start(0))?;
        // Whatever it is, it is read as lines only if it can be ours.
        let mut head = Vec::new();
        reader.by_ref().take(HEAD.len() as u64).read_to_end(&mut head)?;
        if !HEAD.as_bytes().starts_with(&head) {
            return Err(JournalError::NotAResult(1));
        }
        reader.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        for number in 1.. {
            bytes.clear();
            reader.read_until(b'\n', &mut bytes)?;
            if bytes.last() != Some(&b'\n') {
                break;
            }
            self.recall_line(input, number, &bytes)?;
            self.bytes += bytes.len() as u64;
        }
        if !bytes.is_empty() {
            self.file.set_len(self.bytes)?;
        }
        Ok(())
    }

    fn recall_line(&mut self, input: &Input, number: usize, bytes: &[u8]) -> Result<(), JournalError> {
        let Ok(result) = serde_json::from_slice::<Stored>(bytes) else {
            return Err(JournalError::NotAResult(number));
        };
        let custom_id = result.custom_id.clone();
        let Some(index) = input.place(&custom_id).filter(|&index| input.id(index) == result.id) else {
            return Err(JournalError::Foreign { line: number, custom_id });
        };
        if std::mem::replace(&mut self.answered[index], true) {
            return Err(JournalError::Twice { line: number, custom_id });
        }
        self.count(result.succeeded());
        Ok(())
    }

    /// Adds an answer, whole: once this has returned, a kill does not lose it. After an error nothing may be added any
    /// more, for the file may end within a line.
    pub fn append(&mut self, answer: &Answer) -> io::Result<()> {
        self.file.write_all(&answer.line)?;
        self.answered[answer.index] = true;
        self.bytes += answer.line.len() as u64;
        self.count(answer.succeeded);
        Ok(())
    }

    fn count(&mut self, succeeded: bool) {
        if succeeded {
            self.counts.completed += 1;
        } else {
            self.counts.failed += 1;
        }
    }

    /// Requests without an answer, in the order of the input.
    pub fn left(&self) -> Vec<usize> {
        (0..self.answered.len()).filter(|&index| !self.answered[index]).collect()
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Of all lines.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A result as far as the journal must know it.
#[derive(Deserialize)]
struct Stored {
    id: String,
    custom_id: String,
    response: Option<Head>,
}

#[derive(Deserialize)]
struct Head {
    status_code: u16,
}

impl Stored {
    fn succeeded(&self) -> bool {
        self.response.as_ref().is_some_and(|head| head.status_code == 200)
    }
}

/// Whether a line of the output stands for success.
pub fn succeeded(line: &[u8]) -> bool {
    serde_json::from_slice::<Stored>(line).is_ok_and(|result| result.succeeded())
}

/// A result line: `response` is `{status_code, request_id, body}`, or `error` says why there is none.
pub fn result_line(id: &str, custom_id: &str, response: Value, error: Value) -> Vec<u8> {
    let result = json!({"id": id, "custom_id": custom_id, "response": response, "error": error});
    let mut line = result.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::super::input::Limits;
    use super::*;
    use tempfile::TempDir;

    const LIMITS: Limits = Limits { line: 1000, lines: 100, endpoint: None };

    fn input(folder: &TempDir, names: &[&str], prompt: &str) -> Input {
        let path = folder.path().join("in.jsonl");
        let line = |name: &&str| {
            json!({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}})
                .to_string()
        };
        std::fs::write(&path, names.iter().map(line).collect::<Vec<_>>().join("\n")).unwrap();
        Input::read(&path, &LIMITS).unwrap()
    }

    fn answer(input: &Input, index: usize, status: u16) -> Answer {
        let response = json!({"status_code": status, "request_id": "r", "body": {"text": "ü\n"}});
        let name = input.line(index).unwrap().custom_id;
        let line = result_line(&input.id(index), &name, response, Value::Null);
        Answer { index, line, succeeded: status == 200 }
    }

    #[test]
    fn wherever_the_file_was_cut_whole_lines_stay_and_the_rest_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let input = input(&folder, &["a", "b", "c"], "x");
        let whole = [answer(&input, 2, 200).line, answer(&input, 0, 400).line].concat();
        let first = answer(&input, 2, 200).line.len();
        let path = folder.path().join("out.jsonl");
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut journal = Journal::open(&path, &input).unwrap();
            let expected = match cut {
                cut if cut == whole.len() => vec![1],
                cut if cut >= first => vec![0, 1],
                _ => vec![0, 1, 2],
            };
            assert_eq!(journal.left(), expected, "cut at {cut}");
            for index in expected {
                journal.append(&answer(&input, index, 200)).unwrap();
            }
            drop(journal);
            let journal = Journal::open(&path, &input).unwrap();
            assert_eq!((journal.left(), journal.bytes()), (vec![], path.metadata().unwrap().len()));
            assert_eq!(journal.counts().completed + journal.counts().failed, 3);
        }
    }

    #[test]
    fn a_file_of_something_else_is_refused_and_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let other = answer(&input(&folder, &["a"], "other"), 0, 200).line;
        let unknown = answer(&input(&folder, &["z"], "x"), 0, 200).line;
        let input = input(&folder, &["a", "b"], "x");
        let own = answer(&input, 0, 200).line;
        let path = folder.path().join("out.jsonl");
        let check = |content: &[u8], words: &str| {
            std::fs::write(&path, content).unwrap();
            let error = Journal::open(&path, &input).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), content);
        };
        check(&other, "line 1 answers `a`, which is not asked like that");
        check(&unknown, "another input");
        check(&[&own[..], &own[..]].concat(), "line 2 answers `a` a second time");
        check(&[&own[..], b"\n"].concat(), "line 2 is no result");
        check(b"a letter to my mother", "line 1 is no result");
        check(b"{\"custom_id\":\"a\"}\n", "line 1 is no result");
    }

    #[test]
    fn one_process_at_a_time_writes() {
        let folder = tempfile::tempdir().unwrap();
        let input = input(&folder, &["a"], "x");
        let path = folder.path().join("out.jsonl");
        let held = Journal::open(&path, &input).unwrap();
        assert!(matches!(Journal::open(&path, &input), Err(JournalError::Locked)));
        drop(held);
        assert!(Journal::open(&path, &input).is_ok());
    }
}
