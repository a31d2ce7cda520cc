/* A server of token streams whose truth is known: every token is the time at which it was sent.
 *
 *   scripted_server TTFT_US ITL_US BATCH SPLIT
 *
 * Answers POST .../completions and .../chat/completions with as many tokens as `max_tokens` (or max_completion_tokens)
 * in the body asks for, the first TTFT_US after the request has arrived (by the kernel's stamp) and one every ITL_US
 * after it. BATCH 1: all streams get their tokens at the same moments, as from an engine that steps a batch. SPLIT 1:
 * every event is sent in two parts, cut at any byte. The port is printed on stdout. GET /stats gives the truth since the
 * last such request: {"requests", "tokens", "ttft_ms", "icl_ms", "icl_p99_ms", "late_ms", "cpu_s", "stalls"}.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST_FDS 65536
#define BUCKET_NS 10000
#define BUCKETS 400000

struct stream {
    char *in;
    size_t have, room;
    int64_t arrived_ns, due_ns, sent_ns, place; /* place in the heap; -1: no answer under way */
    int left, made, is_chat, wants_usage, prompt_tok;
};

static struct stream streams[MOST_FDS];
static int heap[MOST_FDS], in_heap;
static int64_t ttft_ns, itl_ns, ahead_ns;
static int is_batch, is_split;
static uint64_t requests, tokens, firsts, gaps, stalls, buckets[BUCKETS], seed = 88172645463325252ull;
static double ttft_sum_ns, gap_sum_ns, late_sum_ns;
static struct rusage before;

static int64_t now_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void sift(int at) {
    int fd = heap[at];
    while (at && streams[heap[(at - 1) / 2]].due_ns > streams[fd].due_ns) {
        heap[at] = heap[(at - 1) / 2];
        streams[heap[at]].place = at;
        at = (at - 1) / 2;
    }
    for (int child; (child = 2 * at + 1) < in_heap; at = child) {
        if (child + 1 < in_heap && streams[heap[child + 1]].due_ns < streams[heap[child]].due_ns) child++;
        if (streams[heap[child]].due_ns >= streams[fd].due_ns) break;
        heap[at] = heap[child];
        streams[heap[at]].place = at;
    }
    heap[at] = fd;
    streams[fd].place = at;
}

static void push(int fd, int64_t due_ns) {
    if (is_batch) due_ns = (due_ns + itl_ns - 1) / itl_ns * itl_ns;
    streams[fd].due_ns = due_ns;
    if (streams[fd].place < 0) heap[streams[fd].place = in_heap++] = fd;
    sift(streams[fd].place);
}

static void drop_from_heap(int fd) {
    int at = streams[fd].place;
    if (at < 0) return;
    streams[fd].place = -1;
    if (at != --in_heap) {
        heap[at] = heap[in_heap];
        streams[heap[at]].place = at;
        sift(at);
    }
}

static void end(int fd) {
    drop_from_heap(fd);
    free(streams[fd].in);
    memset(&streams[fd], 0, sizeof streams[fd]);
    streams[fd].place = -1;
    close(fd);
}

static void put(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) { /* the client does not read: wait for it, and count that */
            struct pollfd wait = {fd, POLLOUT, 0};
            stalls++;
            if (poll(&wait, 1, 1000) <= 0) return;
        } else if (sent < 0) {
            return;
        } else {
            data += sent, size -= sent;
        }
    }
}

static void put_event(int fd, char *data, size_t size) {
    if (is_split && size > 1) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        size_t cut = 1 + seed % (size - 1);
        put(fd, data, cut);
        data += cut, size -= cut;
    }
    put(fd, data, size);
}

static void send_token(int fd) {
    struct stream *s = &streams[fd];
    char event[512], chunk[1200];
    const char *finish = s->left == 1 ? "\"length\"" : "null";
    int64_t now_ns = now_of(CLOCK_MONOTONIC);
    const char *object = s->is_chat ? "chat.completion.chunk" : "text_completion";
    int size = snprintf(event, sizeof event,
        "data: {\"id\":\"c-%d\",\"object\":\"%s\",\"created\":1764500000,\"model\":\"m\",\"choices\":[{\"index\":0,"
        "%s\" %lld\"%s,\"finish_reason\":%s}]}\n\n", fd, object, s->is_chat ? "\"delta\":{\"content\":" : "\"text\":",
        (long long)now_ns, s->is_chat ? "}" : "", finish);
    int length = sprintf(chunk, "%x\r\n%s\r\n", size, event);
    if (s->left == 1) {
        int total = s->made + 1;
        if (s->wants_usage) {
            size = snprintf(event, sizeof event,
                "data: {\"id\":\"c-%d\",\"object\":\"%s\",\"created\":1764500000,\"model\":\"m\",\"choices\":[],"
                "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n", fd, object,
                s->prompt_tok, total, s->prompt_tok + total);
            length += sprintf(chunk + length, "%x\r\n%s\r\n", size, event);
        }
        length += sprintf(chunk + length, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    }
    put_event(fd, chunk, length);
    late_sum_ns += now_ns - s->due_ns;
    if (!s->made) {
        ttft_sum_ns += now_ns - s->arrived_ns, firsts++;
    } else {
        int64_t bucket = (now_ns - s->sent_ns) / BUCKET_NS;
        buckets[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
        gap_sum_ns += now_ns - s->sent_ns, gaps++;
    }
    s->sent_ns = now_ns, s->made++, tokens++;
    if (--s->left) {
        push(fd, s->due_ns + itl_ns);
    } else {
        requests++;
        drop_from_heap(fd);
    }
}

static void answer(int fd, const char *type, const char *body) {
    char head[2048];
    int size = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s", type,
        strlen(body), body);
    put(fd, head, size);
}

static void answer_stats(int fd) {
    struct rusage used;
    char body[512];
    uint64_t seen = 0, place = 0;
    getrusage(RUSAGE_SELF, &used);
    while (place < BUCKETS - 1 && (seen += buckets[place]) * 100 < gaps * 99) place++;
#define S(r) ((r).ru_utime.tv_sec + (r).ru_stime.tv_sec + ((r).ru_utime.tv_usec + (r).ru_stime.tv_usec) / 1e6)
    snprintf(body, sizeof body, "{\"requests\":%llu,\"tokens\":%llu,\"ttft_ms\":%.6f,\"icl_ms\":%.6f,\"icl_p99_ms\":%.3f,"
        "\"late_ms\":%.6f,\"cpu_s\":%.6f,\"stalls\":%llu}", (unsigned long long)requests, (unsigned long long)tokens,
        ttft_sum_ns / 1e6 / (firsts ? firsts : 1), gap_sum_ns / 1e6 / (gaps ? gaps : 1),
        (place + 0.5) * BUCKET_NS / 1e6, late_sum_ns / 1e6 / (tokens ? tokens : 1), S(used) - S(before),
        (unsigned long long)stalls);
    before = used;
    requests = tokens = firsts = gaps = stalls = 0;
    ttft_sum_ns = gap_sum_ns = late_sum_ns = 0;
    memset(buckets, 0, sizeof buckets);
    answer(fd, "application/json", body);
}

static int number_after(const char *text, const char *name, int otherwise) {
    const char *found = strstr(text, name);
    if (!found) return otherwise;
    found += strlen(name);
    while (*found == '"' || *found == ':' || *found == ' ') found++;
    return *found >= '0' && *found <= '9' ? atoi(found) : otherwise;
}

/* Deal with one whole request at the start of what came; 0: it is not whole yet. */
static size_t take_request(int fd) {
    struct stream *s = &streams[fd];
    char *body = strstr(s->in, "\r\n\r\n");
    if (!body) return 0;
    *body = 0;
    char *length = strcasestr(s->in, "\r\ncontent-length:");
    size_t body_b = length ? strtoul(length + 17, NULL, 10) : 0, whole = body + 4 - s->in + body_b;
    if (s->have < whole) {
        if (strcasestr(s->in, "\r\nexpect:")) put(fd, "HTTP/1.1 100 Continue\r\n\r\n", 25);
        *body = '\r';
        return 0;
    }
    char after = s->in[whole];
    s->in[whole] = 0;
    body += 4;
    if (!strncmp(s->in, "GET /stats", 10)) {
        answer_stats(fd);
    } else if (!strncmp(s->in, "GET", 3)) {
        answer(fd, "application/json", "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,"
            "\"owned_by\":\"t\",\"max_model_len\":100000}]}");
    } else {
        int most = number_after(body, "\"max_completion_tokens\"", number_after(body, "\"max_tokens\"", 16));
        s->is_chat = strstr(s->in, "chat/") != NULL;
        s->wants_usage = strstr(body, "include_usage") != NULL;
        s->prompt_tok = 1 + body_b / 4;
        s->left = most > 0 ? most : 1, s->made = 0;
        if (strstr(body, "\"stream\":true") || strstr(body, "\"stream\": true")) {
            put(fd, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", 80);
            push(fd, s->arrived_ns + ttft_ns);
        } else {
            answer(fd, "application/json", "{\"id\":\"c\",\"object\":\"text_completion\",\"created\":1,\"model\":\"m\","
                "\"choices\":[{\"index\":0,\"text\":\" a\",\"message\":{\"role\":\"assistant\",\"content\":\" a\"},"
                "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1,\"total_tokens\":2}}");
        }
    }
    s->in[whole] = after;
    return whole;
}

static void take_bytes(int fd) {
    struct stream *s = &streams[fd];
    char aux[CMSG_SPACE(sizeof(struct timespec))];
    if (s->have + 65536 + 1 > s->room) s->in = realloc(s->in, s->room = 2 * s->room + 131072);
    struct iovec part = {s->in + s->have, s->room - s->have - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = aux, .msg_controllen = sizeof aux};
    ssize_t got = recvmsg(fd, &message, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        end(fd);
        return;
    }
    s->arrived_ns = now_of(CLOCK_MONOTONIC);
    struct cmsghdr *found = CMSG_FIRSTHDR(&message);
    if (found && found->cmsg_type == SCM_TIMESTAMPNS) {
        struct timespec t;
        memcpy(&t, CMSG_DATA(found), sizeof t);
        s->arrived_ns = t.tv_sec * 1000000000ll + t.tv_nsec - ahead_ns;
    }
    s->have += got;
    s->in[s->have] = 0;
    for (size_t used; s->have && (used = take_request(fd));) {
        memmove(s->in, s->in + used, s->have - used + 1);
        s->have -= used;
    }
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    ttft_ns = atoll(argv[1]) * 1000, itl_ns = atoll(argv[2]) * 1000;
    is_batch = atoi(argv[3]), is_split = atoi(argv[4]);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < MOST_FDS ? files.rlim_max : MOST_FDS;
    setrlimit(RLIMIT_NOFILE, &files);
    for (int fd = 0; fd < MOST_FDS; fd++) streams[fd].place = -1;
    ahead_ns = now_of(CLOCK_REALTIME) - now_of(CLOCK_MONOTONIC);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poller = epoll_create1(0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (void *)&address, size) || listen(listener, 4096)) return 1;
    getsockname(listener, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[1024];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int64_t now_ns = now_of(CLOCK_MONOTONIC), wait_ns = 1000000000;
        while (in_heap && streams[heap[0]].due_ns <= now_ns) send_token(heap[0]);
        if (in_heap && (wait_ns = streams[heap[0]].due_ns - now_of(CLOCK_MONOTONIC)) < 0) wait_ns = 0;
        struct timespec wait = {wait_ns / 1000000000, wait_ns % 1000000000};
        int count = epoll_pwait2(poller, ready, 1024, &wait, NULL);
        for (int place = 0; place < count; place++) {
            int fd = ready[place].data.fd;
            if (fd != listener) {
                take_bytes(fd);
                continue;
            }
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                if (fd >= MOST_FDS) return 1;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
                event.events = EPOLLIN, event.data.fd = fd;
                epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
            }
        }
    }
}
