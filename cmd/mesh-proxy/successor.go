package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/meshd/meshd/proxy/feed"
)

const (
	// startTimeout is how long a successor may take until it could serve, serveTimeout until it does once it may.
	startTimeout = 30 * time.Second
	serveTimeout = 5 * time.Second
	// maxGenerations bounds the processes that drain at a time.
	maxGenerations = 8
)

var (
	errReplacing = errors.New("a restart is under way already: wait for its end")
	errEnding    = errors.New("this process is about to end")
	errReplaced  = errors.New("another process has taken over from this one already")
)

// replaceLater starts a successor, and calls told when it serves or there is none.
func (p *process) replaceLater(told func(pid int, err error)) {
	p.wishes.Go(func() { told(p.replaceNow()) })
}

// replaceNow starts the program anew, and returns when that serves, or why none does: then all is as it was.
func (p *process) replaceNow() (pid int, err error) {
	if !p.replacing.TryLock() {
		return 0, errReplacing
	}
	defer p.replacing.Unlock()
	defer func() {
		if err != nil {
			p.log.Error("another process could not take over, this one serves on", slog.Any("error", err))
		}
	}()
	select {
	case <-p.stop:
		return 0, errEnding
	default:
	}
	if len(p.replaced) > 0 || p.family.left() {
		return 0, errReplaced
	}
	if n := p.counters.earlier(); n >= maxGenerations {
		return 0, fmt.Errorf("%d earlier processes still drain: wait for the end of their connections, or end one of them", n)
	}
	link, heir, err := p.startHeir()
	if err != nil {
		return 0, err
	}
	if err := p.settle(link); err != nil {
		link.Close()
		_ = heir.Kill() // it is gone otherwise
		return 0, err
	}
	p.log.Info("another process has taken over", slog.Int("pid", heir.Pid))
	p.family.leave()
	select {
	case <-p.stop: // all of it is to end
		_ = heir.Signal(syscall.SIGTERM) // it is gone otherwise
	default:
		if p.family.systemd {
			p.tell(mainPID(heir.Pid))
		}
		p.client.Report(p.draining(p.cfg.handover)) // before the answer to who asked for it
		p.replaced <- link
	}
	return heir.Pid, nil
}

// startHeir starts a successor and passes it every socket.
func (p *process) startHeir() (*feed.Link, *os.Process, error) {
	sockets, err := p.plane.Listeners()
	if err != nil {
		return nil, nil, err
	}
	if f := p.scrapes.socket(); f != nil {
		sockets[metricsSocket] = f
	}
	defer func() {
		for _, f := range sockets {
			_ = f.Close()
		}
	}()
	link, theirs, err := feed.NewLinkPair()
	if err != nil {
		return nil, nil, err
	}
	heir, err := p.family.start(theirs)
	_ = theirs.Close()
	if err != nil {
		link.Close()
		return nil, nil, err
	}
	if err := errors.Join(link.WriteSockets(sockets), link.Write(feed.Frame{Step: &feed.Step{To: feed.HeirTake}})); err != nil {
		link.Close()
		_ = heir.Kill() // it is gone otherwise
		return nil, nil, fmt.Errorf("the new process ended before it began; its messages are in the log of this one: %w", err)
	}
	return link, heir, nil
}

// settle waits until a successor serves. Until it is let, it may be given up without a trace.
func (p *process) settle(link *feed.Link) error {
	settled := make(chan struct{})
	defer close(settled)
	let := make(chan struct{})
	go func() {
		select {
		case <-p.stop: // this process is told to end: not now
			link.Close()
		case <-let:
		case <-settled:
		}
	}()
	if err := awaitStep(link, feed.HeirReady, startTimeout); err != nil {
		return err
	}
	close(let)
	if err := link.Write(feed.Frame{Step: &feed.Step{To: feed.HeirServe}}); err != nil {
		return fmt.Errorf("the new process ended before it served: %w", err)
	}
	return awaitStep(link, feed.HeirServing, serveTimeout)
}

func awaitStep(link *feed.Link, to feed.Heir, timeout time.Duration) error {
	by := time.Now().Add(timeout)
	for {
		f, _, err := link.Read(by)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("the new process was not %s after %s; its messages are in the log of this one", to, timeout)
		case err != nil:
			return fmt.Errorf("the new process ended before it was %s; its messages are in the log of this one: %w", to, err)
		case f.Step != nil && f.Step.To == to:
			return nil
		}
	}
}
