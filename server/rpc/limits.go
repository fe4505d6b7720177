package rpc

import (
	"sync"

	"golang.org/x/time/rate"
)

// limits bounds how often signatures are asked for.
type limits struct {
	join     *rate.Limiter
	signRate rate.Limit

	mu   sync.Mutex
	sign map[string]*rate.Limiter // by node; nodes are authenticated, so they are as many as there are records
}

func newLimits(config Config) *limits {
	return &limits{
		join:     rate.NewLimiter(rate.Limit(config.JoinRate), int(config.JoinRate*burst)),
		signRate: rate.Limit(config.SignRate),
		sign:     make(map[string]*rate.Limiter),
	}
}

func (l *limits) allowJoin() bool { return l.join.Allow() }

func (l *limits) allowSign(node string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	limiter, ok := l.sign[node]
	if !ok {
		limiter = rate.NewLimiter(l.signRate, int(l.signRate*burst))
		l.sign[node] = limiter
	}
	return limiter.Allow()
}

// forget drops the limiter of a node that no longer exists.
func (l *limits) forget(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.sign, node)
}
