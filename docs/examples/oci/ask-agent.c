/* OCI hook startContainer: asks the agent of the host to restore into this container, and waits.
 *
 *     cc -std=c11 -Wall -Wextra -static -o ask-agent ask-agent.c
 *     "startContainer": [{"path": "/run/ghosts/ask-agent", "args": ["ask-agent"]}]
 *
 * It runs in the container, when all its mounts are there and before its program. So it must be a
 * program that needs nothing of the container: static, and in the directory that bring-agent.py has
 * mounted. Which container it is the agent knows from the kernel; "restore" is all that is said. The
 * answer is "ok", or why not. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "/run/ghosts/agent.sock";
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    char answer[4096] = "the agent has gone away";

    if (strlen(path) >= sizeof name.sun_path) {
        fprintf(stderr, "%s: too long for the path of a socket\n", path);
        return 1;
    }
    strcpy(name.sun_path, path);
    int agent = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (agent < 0 || connect(agent, (struct sockaddr *)&name, sizeof name) < 0 ||
        send(agent, "restore", 7, MSG_NOSIGNAL) < 0) {
        perror(path);
        return 1;
    }
    ssize_t length = recv(agent, answer, sizeof answer - 1, 0);
    if (length > 0)
        answer[length] = '\0';
    if (length == 2 && strcmp(answer, "ok") == 0)
        return 0;
    fprintf(stderr, "ghosts: %s\n", answer);
    return 1;
}
