//! A handler of missing pages on the crate `userfaultfd`, as its users write them: poll, read the
//! events, copy.  With `--rereads N` it reads again up to N times before it polls.
//!
//! It receives the client's userfaultfd over `--socket` with a line of JSON that says where its
//! memory is, answers from `--image`, mapped and brought in beforehand, on the core `--cpu`, and
//! ends with the socket.  See benchmarks/native/toucher.c.

use std::env;
use std::error::Error;
use std::ffi::c_void;
use std::fs::File;
use std::io::IoSliceMut;
use std::num::NonZeroUsize;
use std::os::fd::{BorrowedFd, FromRawFd, RawFd};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags};
use nix::sched::{sched_setaffinity, sched_yield, CpuSet};
use nix::sys::mman::{mmap, MapFlags, ProtFlags};
use nix::sys::signal::{signal, SigHandler, Signal};
use nix::sys::socket::{recvmsg, send, ControlMessageOwned, MsgFlags};
use nix::unistd::{getpid, Pid};
use serde_json::Value;
use userfaultfd::{Error as UffdError, Event, EventBuffer, Uffd};

const PAGE: usize = 4096;
const MESSAGES: usize = 64;

type Outcome<T> = Result<T, Box<dyn Error>>;

struct Options {
    socket: RawFd,
    image: String,
    cpu: Option<usize>,
    rereads: usize,
}

struct Region {
    start: usize,
    length: usize,
    source: usize,
}

fn parse() -> Outcome<Options> {
    let mut options = Options { socket: -1, image: String::new(), cpu: None, rereads: 0 };
    let mut words = env::args().skip(1);
    while let Some(name) = words.next() {
        let value = words.next().ok_or("every option has a value")?;
        match name.as_str() {
            "--socket" => options.socket = value.parse()?,
            "--image" => options.image = value,
            "--cpu" => options.cpu = Some(value.parse()?),
            "--rereads" => options.rereads = value.parse()?,
            other => return Err(format!("no such option: {other}").into()),
        }
    }
    Ok(options)
}

/// The client's userfaultfd and its line of JSON.
fn receive(socket: RawFd) -> Outcome<(Uffd, Value)> {
    let mut text = vec![0; 1 << 16];
    let mut space = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut text)];
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let length = message.bytes;
    let descriptor = message
        .cmsgs()
        .find_map(|attached| match attached {
            ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
            _ => None,
        })
        .ok_or("no descriptor came")?;
    // SAFETY: the descriptor has just arrived, and nobody else in this process knows it.
    let uffd = unsafe { Uffd::from_raw_fd(descriptor) };
    Ok((uffd, serde_json::from_slice(&text[..length])?))
}

/// Pairs of numbers.
fn pairs(value: &Value) -> Outcome<Vec<(usize, usize)>> {
    let number = |pair: &Value, at: usize| pair[at].as_u64().map(|found| found as usize);
    value
        .as_array()
        .and_then(|list| {
            list.iter().map(|pair| Some((number(pair, 0)?, number(pair, 1)?))).collect()
        })
        .ok_or_else(|| format!("not pairs of numbers: {value}").into())
}

/// The client's regions, sorted, each with where its bytes lie in the image.
fn map_image(path: &str, handed: &Value) -> Outcome<Vec<Region>> {
    let regions = pairs(&handed["regions"])?;
    let total =
        NonZeroUsize::new(regions.iter().map(|(_, length)| length).sum()).ok_or("no memory")?;
    let file = File::open(path)?;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let image = unsafe {
        mmap(None, total, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, Some(&file), 0)? as usize
    };
    for (offset, length) in pairs(&handed["windows"])? {
        for page in (image + offset..image + offset + length).step_by(PAGE) {
            // SAFETY: it lies in the mapping.
            unsafe { (page as *const u8).read_volatile() };
        }
    }
    let mut source = image;
    let mut result = Vec::new();
    for (start, length) in regions {
        result.push(Region { start, length, source });
        source += length;
    }
    result.sort_by_key(|region| region.start);
    Ok(result)
}

fn answer(uffd: &Uffd, regions: &[Region], address: usize) -> Outcome<()> {
    let page = address & !(PAGE - 1);
    let at = regions.partition_point(|region| region.start <= page);
    let region = regions[..at].last().filter(|region| page - region.start < region.length);
    let region = region.ok_or("a fault outside every region")?;
    let source = (page - region.start + region.source) as *const c_void;
    loop {
        // SAFETY: the page is the client's, the source in our mapping.
        match unsafe { uffd.copy(source, page as *mut c_void, PAGE, true) } {
            Ok(_) => return Ok(()),
            Err(UffdError::PartiallyCopied(_)) => continue,
            Err(UffdError::CopyFailed(Errno::EEXIST)) => {
                return Ok(uffd.wake(page as *mut c_void, PAGE)?)
            }
            Err(UffdError::CopyFailed(Errno::ESRCH)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// One read and its answers; how many.
fn drain(uffd: &Uffd, regions: &[Region], buffer: &mut EventBuffer) -> Outcome<usize> {
    let mut count = 0;
    for event in uffd.read_events(buffer)? {
        if let Event::Pagefault { addr, .. } = event? {
            answer(uffd, regions, addr as usize)?;
            count += 1;
        }
    }
    Ok(count)
}

fn serve(uffd: &Uffd, socket: BorrowedFd<'_>, regions: &[Region], rereads: usize) -> Outcome<()> {
    let mut buffer = EventBuffer::new(MESSAGES);
    loop {
        let mut waiting =
            [PollFd::new(uffd, PollFlags::POLLIN), PollFd::new(&socket, PollFlags::POLLIN)];
        match poll(&mut waiting, -1) {
            Err(Errno::EINTR) => continue,
            result => result?,
        };
        if waiting[1].any() == Some(true) {
            return Ok(());
        }
        drain(uffd, regions, &mut buffer)?;
        let mut tries = 0;
        while tries < rereads {
            sched_yield()?;
            tries = if drain(uffd, regions, &mut buffer)? > 0 { 0 } else { tries + 1 };
        }
    }
}

fn main() -> Outcome<()> {
    let options = parse()?;
    // SAFETY: nothing is called.  The end of the socket is the end; a SIGTERM may follow it.
    unsafe { signal(Signal::SIGTERM, SigHandler::SigIgn)? };
    if let Some(cpu) = options.cpu {
        let mut cores = CpuSet::new();
        cores.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &cores)?;
    }
    let (uffd, handed) = receive(options.socket)?;
    let regions = map_image(&options.image, &handed)?;
    let ready = format!("go {}\n", getpid());
    send(options.socket, ready.as_bytes(), MsgFlags::empty())?;
    // SAFETY: the harness has handed us the socket, open as long as we run.
    let socket = unsafe { BorrowedFd::borrow_raw(options.socket) };
    serve(&uffd, socket, &regions, options.rereads)
}
