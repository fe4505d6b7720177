package faultfs

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// valid is how long the kernel may remember attributes and names. All changes
// come through it.
const valid = time.Minute

// killPoll is how often a call that hangs looks whether its thread is to die.
const killPoll = 10 * time.Millisecond

// calls answers the kernel. What it does not have is ENOSYS.
type calls struct {
	fuse.RawFileSystem
	fs *FS
}

func (c *calls) String() string { return "faultfs" }

// node returns a node that the kernel knows; the mutex is held from then on.
func (c *calls) node(id uint64) (*node, func()) {
	c.fs.mu.Lock()
	return c.fs.nodes[id], c.fs.mu.Unlock
}

func (n *node) attr() fuse.Attr {
	a := fuse.Attr{
		Ino: n.id, Mode: n.mode, Nlink: 1, Owner: fuse.Owner{Uid: n.uid, Gid: n.gid},
		Size: uint64(n.image[live].size), Blocks: uint64(n.pages()) * pageSize / sectorSize, Blksize: pageSize,
	}
	a.SetTimes(&n.changed, &n.changed, &n.changed)
	return a
}

func (n *node) reply(out *fuse.EntryOut) fuse.Status {
	n.lookups++
	out.NodeId, out.Attr = n.id, n.attr()
	out.SetEntryTimeout(valid)
	out.SetAttrTimeout(valid)
	return fuse.OK
}

func (c *calls) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir, unlock := c.node(in.NodeId)
	defer unlock()
	child := dir.entries[live][name]
	if child == nil {
		return fuse.ENOENT
	}
	return child.reply(out)
}

func (c *calls) Forget(id, times uint64) {
	n, unlock := c.node(id)
	defer unlock()
	if n == nil {
		return
	}
	n.lookups -= min(n.lookups, times)
	if n.lookups == 0 {
		c.fs.relink()
	}
}

func (c *calls) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, unlock := c.node(in.NodeId)
	defer unlock()
	out.Attr = n.attr()
	out.SetTimeout(valid)
	return fuse.OK
}

func (c *calls) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, unlock := c.node(in.NodeId)
	defer unlock()
	if mode, ok := in.GetMode(); ok {
		n.mode = n.mode&unix.S_IFMT | mode&0o7777
	}
	if uid, ok := in.GetUID(); ok {
		n.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.gid = gid
	}
	if at, ok := in.GetMTime(); ok {
		n.changed = at
	}
	if size, ok := in.GetSize(); ok {
		n.resize(int64(size))
	}
	out.Attr = n.attr()
	out.SetTimeout(valid)
	return fuse.OK
}

// add makes a node with a name.
func (c *calls) add(in fuse.InHeader, name string, mode uint32, out *fuse.EntryOut) fuse.Status {
	dir, unlock := c.node(in.NodeId)
	defer unlock()
	if dir.entries[live][name] != nil {
		return fuse.Status(unix.EEXIST)
	}
	if !c.fs.room(1) {
		return fuse.Status(unix.ENOSPC)
	}
	n := c.fs.newNode(mode, in.Uid, in.Gid)
	c.fs.enter(entry{dir, name, n})
	return n.reply(out)
}

func (c *calls) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return c.add(in.InHeader, name, in.Mode, out)
}

func (c *calls) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return c.add(in.InHeader, name, in.Mode&0o7777|unix.S_IFDIR, out)
}

func (c *calls) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	return c.add(in.InHeader, name, in.Mode, &out.EntryOut)
}

func (c *calls) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	dir, unlock := c.node(in.NodeId)
	defer unlock()
	if dir.entries[live][name] == nil {
		return fuse.ENOENT
	}
	c.fs.enter(entry{dir, name, nil})
	return fuse.OK
}

func (c *calls) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	dir, unlock := c.node(in.NodeId)
	defer unlock()
	child := dir.entries[live][name]
	if child == nil {
		return fuse.ENOENT
	}
	if len(child.entries[live]) > 0 {
		return fuse.Status(unix.ENOTEMPTY)
	}
	c.fs.enter(entry{dir, name, nil})
	return fuse.OK
}

func (c *calls) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	from, unlock := c.node(in.NodeId)
	defer unlock()
	to := c.fs.nodes[in.Newdir]
	moved, there := from.entries[live][oldName], to.entries[live][newName]
	switch {
	case moved == nil || there == nil && in.Flags == unix.RENAME_EXCHANGE:
		return fuse.ENOENT
	case in.Flags == unix.RENAME_EXCHANGE:
		c.fs.enter(entry{from, oldName, there}, entry{to, newName, moved})
		return fuse.OK
	case in.Flags&^unix.RENAME_NOREPLACE != 0:
		return fuse.EINVAL
	case there != nil && in.Flags != 0:
		return fuse.Status(unix.EEXIST)
	case there != nil && len(there.entries[live]) > 0:
		return fuse.Status(unix.ENOTEMPTY)
	}
	c.fs.enter(entry{from, oldName, nil}, entry{to, newName, moved})
	return fuse.OK
}

func (c *calls) Open(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	n, unlock := c.node(in.NodeId)
	defer unlock()
	if in.Flags&unix.O_TRUNC != 0 {
		n.resize(0)
	}
	return fuse.OK
}

func (c *calls) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, unlock := c.node(in.NodeId)
	defer unlock()
	got := n.read(buf, int64(in.Offset))
	return fuse.ReadResultData(buf[:got]), fuse.OK
}

func (c *calls) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if !c.fs.hang(cancel, in.Pid, func(f Faults) bool { return f.HangWrite }) {
		return 0, fuse.EINTR
	}
	n, unlock := c.node(in.NodeId)
	defer unlock()
	offset := int64(in.Offset)
	if !c.fs.room(n.missing(offset, int64(len(data)))) {
		return 0, fuse.Status(unix.ENOSPC)
	}
	n.write(data, offset)
	return uint32(len(data)), fuse.OK
}

func (c *calls) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	n, unlock := c.node(in.NodeId)
	defer unlock()
	if in.Mode&^unix.FALLOC_FL_KEEP_SIZE != 0 {
		return fuse.Status(unix.EOPNOTSUPP)
	}
	end := int64(in.Offset + in.Length)
	pages := (end + pageSize - 1) / pageSize
	if !c.fs.room(n.missing(0, end)) {
		return fuse.Status(unix.ENOSPC)
	}
	n.reserved = max(n.reserved, pages)
	if in.Mode == 0 && end > n.image[live].size {
		n.resize(end)
	}
	return fuse.OK
}

func (c *calls) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (c *calls) Release(<-chan struct{}, *fuse.ReleaseIn) {}

func (c *calls) ReleaseDir(*fuse.ReleaseIn) {}

func (c *calls) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return c.sync(cancel, in, (*node).sync, (*node).clean)
}

func (c *calls) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return c.sync(cancel, in, c.fs.syncDir, func(*node) {})
}

// sync does or fails to do what a sync does. What was written while it waited is
// synced as well, which a disk may do. That of a thread which is killed meanwhile
// never reaches the disk, so that a power loss finds something to take.
func (c *calls) sync(cancel <-chan struct{}, in *fuse.FsyncIn, do, fail func(*node)) fuse.Status {
	c.fs.mu.Lock()
	delay := c.fs.faults.SyncDelay
	c.fs.mu.Unlock()
	if delay > 0 {
		<-time.After(delay)
		if killed(in.Pid) {
			return fuse.EINTR
		}
	}
	if !c.fs.hang(cancel, in.Pid, func(f Faults) bool { return f.HangSync }) {
		return fuse.EINTR
	}
	n, unlock := c.node(in.NodeId)
	defer unlock()
	defer c.fs.turn()
	if c.fs.faults.FailSyncs > 0 {
		c.fs.faults.FailSyncs--
		c.fs.stats.Failed++
		fail(n)
		return fuse.EIO
	}
	do(n)
	c.fs.stats.Syncs++
	return fuse.OK
}

// hang waits while a fault is on. It reports false when the thread that called is
// to be killed.
func (f *FS) hang(cancel <-chan struct{}, thread uint32, on func(Faults) bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !on(f.faults) {
		return true
	}
	f.stats.Hanging++
	f.turn()
	defer func() {
		f.stats.Hanging--
		f.turn()
	}()
	for on(f.faults) {
		changed := f.changed
		// The kernel cancels for any signal, and Go's runtime sends some; a disk
		// that hangs takes notice of none but SIGKILL.
		var look <-chan time.Time
		interrupted := cancel
		select {
		case <-cancel:
			if killed(thread) {
				return false
			}
			interrupted, look = nil, time.After(killPoll)
		default:
		}
		f.mu.Unlock()
		select {
		case <-changed:
		case <-interrupted:
		case <-look:
		}
		f.mu.Lock()
	}
	return true
}

// killed reports whether a thread has SIGKILL pending, or is gone.
func killed(thread uint32) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", thread))
	if err != nil {
		return true
	}
	for line := range bytes.Lines(status) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if string(name) != "SigPnd" && string(name) != "ShdPnd" {
			continue
		}
		pending, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
		if err == nil && pending&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

func (c *calls) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.OK }

// listing returns the entries of a folder from an offset on.
func (c *calls) listing(dir *node, from uint64) []fuse.DirEntry {
	list := []fuse.DirEntry{
		{Name: ".", Ino: dir.id, Mode: unix.S_IFDIR, Off: 1},
		{Name: "..", Ino: fuse.FUSE_UNKNOWN_INO, Mode: unix.S_IFDIR, Off: 2},
	}
	for i, name := range sortedKeys(dir.entries[live]) {
		child := dir.entries[live][name]
		list = append(list, fuse.DirEntry{Name: name, Ino: child.id, Mode: child.mode, Off: uint64(i) + 3})
	}
	return list[min(from, uint64(len(list))):]
}

func (c *calls) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	dir, unlock := c.node(in.NodeId)
	defer unlock()
	for _, e := range c.listing(dir, in.Offset) {
		if !out.AddDirEntry(e) {
			break
		}
	}
	return fuse.OK
}

func (c *calls) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	dir, unlock := c.node(in.NodeId)
	defer unlock()
	for _, e := range c.listing(dir, in.Offset) {
		to := out.AddDirLookupEntry(e)
		if to == nil {
			break
		}
		if child := dir.entries[live][e.Name]; child != nil {
			child.reply(to)
		}
	}
	return fuse.OK
}

func (c *calls) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	c.fs.mu.Lock()
	defer c.fs.mu.Unlock()
	used, total := uint64(c.fs.used()), uint64(1<<30/pageSize)
	if c.fs.faults.Capacity > 0 {
		total = uint64(c.fs.faults.Capacity) / pageSize
	}
	free := total - min(total, used)
	*out = fuse.StatfsOut{Blocks: total, Bfree: free, Bavail: free, Bsize: pageSize, Frsize: pageSize, NameLen: 255, Files: 1 << 20, Ffree: 1 << 20}
	return fuse.OK
}
