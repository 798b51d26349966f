// A handler of missing pages in Go: poll, read, copy, on golang.org/x/sys/unix.
//
// It receives the client's userfaultfd over -socket with a line of JSON that says where its memory
// is, answers from -image, mapped and brought in beforehand, on the core -cpu, and ends with the
// socket. See benchmarks/native/toucher.c.
package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"runtime"
	"sort"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	page        = 4096
	messages    = 64
	messageSize = 32
	// include/uapi/linux/userfaultfd.h
	eventPagefault = 0x12
	ioctlCopy      = 0xc028aa03
	ioctlWake      = 0x8010aa02
)

// What UFFDIO_COPY takes.
type copyRequest struct {
	destination, source, length, mode uint64
	done                              int64
}

// What UFFDIO_WAKE takes.
type wakeRequest struct {
	start, length uint64
}

// Where the client's memory is: (start, length) and, in the image, (offset, length).
type handed struct {
	Regions [][2]uint64 `json:"regions"`
	Windows [][2]uint64 `json:"windows"`
}

type region struct {
	start, length, source uint64
}

func receive(socket int) (int, handed, error) {
	text := make([]byte, 1<<16)
	space := make([]byte, unix.CmsgSpace(4))
	length, controlLength, _, _, err := unix.Recvmsg(socket, text, space, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, handed{}, err
	}
	attached, err := unix.ParseSocketControlMessage(space[:controlLength])
	if err != nil || len(attached) == 0 {
		return -1, handed{}, errors.New("no descriptor came")
	}
	descriptors, err := unix.ParseUnixRights(&attached[0])
	if err != nil {
		return -1, handed{}, err
	}
	var where handed
	return descriptors[0], where, json.Unmarshal(text[:length], &where)
}

// The client's regions, sorted, each with where its bytes lie in the image, which stays mapped.
func mapImage(path string, where handed) ([]region, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	total := uint64(0)
	for _, pair := range where.Regions {
		total += pair[1]
	}
	image, err := unix.Mmap(int(file.Fd()), 0, int(total), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	for _, window := range where.Windows {
		part := image[window[0] : window[0]+window[1]]
		if err := unix.Madvise(part, unix.MADV_POPULATE_READ); err != nil {
			return nil, err
		}
	}
	source := uint64(uintptr(unsafe.Pointer(&image[0])))
	regions := make([]region, 0, len(where.Regions))
	for _, pair := range where.Regions {
		regions = append(regions, region{pair[0], pair[1], source})
		source += pair[1]
	}
	sort.Slice(regions, func(a, b int) bool { return regions[a].start < regions[b].start })
	return regions, nil
}

func ioctl(descriptor int, request uintptr, argument unsafe.Pointer) error {
	_, _, number := unix.Syscall(unix.SYS_IOCTL, uintptr(descriptor), request, uintptr(argument))
	if number != 0 {
		return number
	}
	return nil
}

func answer(uffd int, regions []region, address uint64) error {
	address -= address % page
	at := sort.Search(len(regions), func(n int) bool { return regions[n].start > address }) - 1
	if at < 0 || address-regions[at].start >= regions[at].length {
		return fmt.Errorf("a fault outside every region, at %#x", address)
	}
	for {
		request := copyRequest{
			destination: address,
			source:      regions[at].source + address - regions[at].start,
			length:      page,
		}
		switch err := ioctl(uffd, ioctlCopy, unsafe.Pointer(&request)); err {
		case nil, unix.ESRCH:
			return nil
		case unix.EAGAIN:
		case unix.EEXIST: // which does not wake
			return ioctl(uffd, ioctlWake, unsafe.Pointer(&wakeRequest{address, page}))
		default:
			return fmt.Errorf("UFFDIO_COPY: %w", err)
		}
	}
}

func serve(uffd, socket int, regions []region) error {
	buffer := make([]byte, messages*messageSize)
	waiting := []unix.PollFd{
		{Fd: int32(uffd), Events: unix.POLLIN},
		{Fd: int32(socket), Events: unix.POLLIN},
	}
	for {
		if _, err := unix.Poll(waiting, -1); err != nil && err != unix.EINTR {
			return err
		}
		if waiting[1].Revents != 0 {
			return nil
		}
		length, err := unix.Read(uffd, buffer)
		if err == unix.EAGAIN || err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		for at := 0; at < length; at += messageSize {
			if buffer[at] != eventPagefault {
				continue
			}
			address := binary.NativeEndian.Uint64(buffer[at+16:])
			if err := answer(uffd, regions, address); err != nil {
				return err
			}
		}
	}
}

func run() error {
	socket := flag.Int("socket", -1, "a connected Unix socket")
	image := flag.String("image", "", "the file that pages are copied from")
	cpu := flag.Int("cpu", -1, "the core to run on")
	flag.Parse()
	// The end of the socket is the end; a SIGTERM may follow it.
	signal.Ignore(unix.SIGTERM)
	runtime.LockOSThread()
	if *cpu >= 0 {
		var cores unix.CPUSet
		cores.Set(*cpu)
		if err := unix.SchedSetaffinity(0, &cores); err != nil {
			return err
		}
	}
	uffd, where, err := receive(*socket)
	if err != nil {
		return err
	}
	regions, err := mapImage(*image, where)
	if err != nil {
		return err
	}
	ready := fmt.Appendf(nil, "go %d\n", os.Getpid())
	if _, err := unix.Write(*socket, ready); err != nil {
		return err
	}
	return serve(uffd, *socket, regions)
}

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}
